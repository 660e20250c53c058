"""Replacements of a file: a folder, a pipe, a broken link."""

import json
import os
import pathlib
import shutil
import socket


def _folder(path: pathlib.Path) -> None:
  path.mkdir()


def _socket(path: pathlib.Path) -> None:
  # Its path is limited to 107 bytes.
  here = os.open(path.parent, os.O_RDONLY)
  try:
    with socket.socket(socket.AF_UNIX) as opened:
      opened.bind(f"/proc/self/fd/{here}/{path.name}")
  finally:
    os.close(here)


def _huge(path: pathlib.Path) -> None:
  with path.open("wb") as file:
    file.truncate(1 << 40)


# Name -> creates it at a path.
NO_FILES = {
  "folder": _folder,
  "pipe": os.mkfifo,
  "socket": _socket,
  "endless link": lambda path: path.symlink_to("/dev/zero"),
  "link to itself": lambda path: path.symlink_to(path.name),
  "dangling link": lambda path: path.symlink_to("nothing"),
}
NO_TEXTS = {
  "huge": _huge,
  "empty": lambda path: path.write_bytes(b""),
  "deep JSON": lambda path: path.write_text("[" * 100_000),
  "deep objects": lambda path: path.write_text('{"text":' * 100_000),
  "list": lambda path: path.write_text("[]"),
  "number": lambda path: path.write_text("1" * 5000),
  "null": lambda path: path.write_text("null"),
  "wrong types": lambda path: path.write_text(
    json.dumps({"digest": 1, "text": 2, "files": 3, "step": 4})
  ),
  "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00"),
}
ALL = NO_FILES | NO_TEXTS


def replace(path: pathlib.Path, kind: str) -> None:
  """Replaces a file or a folder by something else."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
  ALL[kind](path)
