"""JSON files whose damage never ends a run, such as metrics and caches.

The damaged part is moved to `NAME.damaged`, with one warning, and the rest is
used.
"""

import contextlib
import json
import os
import pathlib
import stat
from collections.abc import Callable
from typing import Any

from narvl_jax.files.disk import append, atomically
from narvl_jax.files.stores import is_remote
from narvl_jax.terminal.text import warn

# Appended to the name of a file that is set aside.
DAMAGED = ".damaged"


def make_way(path: pathlib.Path, *, folder: bool = False) -> None:
  """Moves away a folder, pipe or broken link in the place of a file.

  Args:
    path: path of the file, which need not exist.
    folder: whether a folder is expected there instead.

  Raises:
    OSError: it cannot be moved.
  """
  wanted = stat.S_ISDIR if folder else stat.S_ISREG
  try:
    if wanted(path.stat().st_mode):
      return
  except OSError:
    # A broken or cyclic link, or nothing.
    if not path.is_symlink():
      return
  _set_aside(path, "it is not a folder" if folder else "it is not a file")


def _set_aside(path: pathlib.Path, why: str) -> None:
  target = path.with_name(path.name + DAMAGED)
  number = 1
  while target.is_symlink() or target.exists():
    target = path.with_name(f"{path.name}{DAMAGED}.{number}")
    number += 1
  with contextlib.suppress(FileNotFoundError):
    # Another host may have moved it.
    path.rename(target)
    warn(f"{path} cannot be used: {why}; set aside as {target.name}")


def parse_object(text: bytes) -> dict[str, Any] | None:
  """Parses a JSON object in UTF-8; returns None for anything else."""
  try:
    value = json.loads(text.decode("utf-8"))
  # RecursionError: nested too deep.
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None


def read_object(
  path: pathlib.Path,
  is_valid: Callable[[dict[str, Any]], bool] = lambda value: True,
) -> dict[str, Any] | None:
  """Returns the JSON object in a file; None without one. Sets damage aside.

  Args:
    is_valid: whether an object has the expected content.

  Raises:
    OSError: the file cannot be read or moved.
  """
  make_way(path)
  try:
    value = parse_object(path.read_bytes())
  except FileNotFoundError:
    return None
  if value is None or not is_valid(value):
    _set_aside(path, "it is damaged")
    return None
  return value


def read_lines(
  path: pathlib.Path, is_valid: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
  """Returns the JSON objects of the lines of a file, without damaged ones.

  Args:
    path: the file; if it is missing or no file, there are no lines.
    is_valid: whether an object has the expected content.

  Raises:
    OSError: the file cannot be read.
  """
  return [value for value, _ in _split(path, is_valid) if value is not None]


def repair_lines(
  path: pathlib.Path, is_valid: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
  """Returns what `read_lines` does; moves damaged lines to another file.

  No other process may be writing the file.

  Raises:
    OSError: a file cannot be read, written or moved.
  """
  make_way(path)
  lines = _split(path, is_valid)
  damaged = [text for value, text in lines if value is None]
  good = [(value, text) for value, text in lines if value is not None]
  if damaged:
    # Lines are removed only after they are in the other file.
    aside = path.with_name(path.name + DAMAGED)
    make_way(aside)
    append(aside, b"".join(text + b"\n" for text in damaged), sync=True)
    _write_lines(path, [text for _, text in good])
    warn(
      f"{path} has {len(damaged)} damaged line{'s' * (len(damaged) > 1)}; set"
      f" aside in {aside.name}"
    )
  elif lines and not _ends_line(path):
    _write_lines(path, [text for _, text in good])
  return [value for value, _ in good]


def _split(
  path: pathlib.Path, is_valid: Callable[[dict[str, Any]], bool]
) -> list[tuple[dict[str, Any] | None, bytes]]:
  """Returns the lines that are not empty, parsed (None: damaged) and raw."""
  if not path.is_file():
    return []
  lines = []
  for text in path.read_bytes().split(b"\n"):
    if text.strip():
      value = parse_object(text)
      if value is not None and not is_valid(value):
        value = None
      lines.append((value, text))
  return lines


def _write_lines(path: pathlib.Path, lines: list[bytes]) -> None:
  with atomically(path) as temporary:
    temporary.write_bytes(b"".join(line + b"\n" for line in lines))


def append_line(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Appends a JSON object as a line of its own.

  Raises:
    OSError: it cannot be written.
  """
  make_way(path)
  # After a line that was cut short.
  start = b"" if _ends_line(path) else b"\n"
  append(path, start + json.dumps(value).encode() + b"\n")


def _ends_line(path: pathlib.Path) -> bool:
  """Returns whether a file ends with a line, is empty or does not exist."""
  if is_remote(path) or not path.exists() or not path.stat().st_size:
    # An object is written at once.
    return True
  with path.open("rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"
