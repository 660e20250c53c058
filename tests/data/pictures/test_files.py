"""Untrusted picture files: rejected files, and the content of messages."""

import io
import os
import pathlib
import socket
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data.pictures import files, images
from narvl_jax.data.sources import load_source
from narvl_jax.errors import UserError
from narvl_jax.prediction.request import read_picture
from tests.conftest import ROOT
from tests.data.pictures import samples

SECRET = b"user=admin\npassword=hunter2-and-more\n" * 4


@pytest.mark.parametrize(
  "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO"]
)
def test_formats(kind: str) -> None:
  pixels = np.full((6, 8, 3), 90, np.uint8)
  data = samples.encode(pixels, kind)
  assert images.original_size(data) == (8, 6)
  image = images.prepare_image(data, (6, 8))
  assert np.abs(image.astype(int) - 90).max() <= 3


@pytest.mark.parametrize(
  "kind",
  ["EPS", "ICO", "PPM", "TGA", "PCX", "SGI", "ICNS", "JPEG2000", "DDS", "PDF"],
)
def test_other_decoders_are_not_reachable(
  kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  file = io.BytesIO()
  Image.new("RGB", (32, 32)).save(file, kind)

  def refuse(*arguments: Any, **options: Any) -> None:
    raise AssertionError("a program was started")

  monkeypatch.setattr(subprocess, "Popen", refuse)
  monkeypatch.setattr(os, "posix_spawn", refuse)
  for read in (images.original_size, lambda x: images.prepare_image(x, (4, 4))):
    with pytest.raises(UserError, match="in no known format"):
      read(file.getvalue())


def test_decoders_are_found_without_importing_all() -> None:
  """Pillow would import 40 modules to find an unknown format."""
  program = (
    "import sys\n"
    "from narvl_jax.data.pictures import images\n"
    "try: images.original_size(b'no picture')\n"
    "except ValueError: pass\n"
    "print([x for x in sys.modules if 'EpsImage' in x or 'FliImage' in x])"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
  )
  assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
  ("start", "kind"),
  [
    (b"", ""),
    (b"%PDF-1.7\n", "that look like a PDF file"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript .EPS. file"),
    (b"\0\0\0\x18ftypheic", "a HEIC file"),
    (b"\0\0\0\x18ftypavif", "an AVIF file"),
    (b"<svg xmlns=", "an SVG or XML file"),
    (b"<!DOCTYPE html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    # The first bytes of formats that are known.
    *((x, "") for x in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a")),
    *((x, "") for x in (b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP")),
  ],
)
def test_content_is_never_quoted(start: bytes, kind: str) -> None:
  for read in (images.original_size, lambda x: images.prepare_image(x, (4, 4))):
    with pytest.raises(UserError, match=kind or "image") as caught:
      read(start + SECRET)
    message = str(caught.value)
    for word in ("user", "admin", "passw", "hunter", "r2-a"):
      assert word not in message
    assert "\n" not in message


def test_damaged_chunks_are_not_quoted() -> None:
  data = samples.encode(np.zeros((4, 4, 3), np.uint8))
  end = data.index(b"IDAT") - 4
  bad = data[:end] + struct.pack(">I", 3) + b"h\x00n2abc\0\0\0\0" + data[end:]
  with pytest.raises(UserError, match=r"damaged|format") as caught:
    images.prepare_image(bad, (4, 4))
  assert "n2" not in str(caught.value)


def test_a_secret_as_image(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "secret.txt"
  path.write_bytes(SECRET)
  with pytest.raises(
    UserError, match=r"secret\.txt.*no known format"
  ) as caught:
    read_picture(path)
  assert "user" not in str(caught.value)


def _jsonl(folder: pathlib.Path, name: str) -> Any:
  path = folder / "own.jsonl"
  path.write_text(f'{{"image": "{name}", "prompt": "?", "target": "x"}}\n')
  return load_source("jsonl", task="vqa", split="train", path=str(path))


@pytest.fixture
def readers(tmp_path: pathlib.Path) -> Any:
  """All ways to open a file by name."""
  return (
    lambda name: images.read_image_file(tmp_path / name),
    lambda name: read_picture(tmp_path / name),
    lambda name: _jsonl(tmp_path, name)[0],
  )


def test_no_regular_file(
  tmp_path: pathlib.Path, readers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  """None of these blocks or fills the memory."""
  os.mkfifo(tmp_path / "pipe.jpg")
  (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
  (tmp_path / "zero.jpg").symlink_to("/dev/zero")
  monkeypatch.chdir(tmp_path)
  opened = socket.socket(socket.AF_UNIX)
  opened.bind("socket.jpg")
  for name in ("pipe.jpg", "link.jpg", "zero.jpg", "socket.jpg"):
    for read in readers:
      with pytest.raises(UserError, match=f"{name}.*not a regular file"):
        read(name)
  opened.close()
  (tmp_path / "loop.jpg").symlink_to("loop.jpg")
  (tmp_path / "folder.jpg").mkdir()
  for name, reason in (
    ("loop.jpg", "symbolic links"),
    ("folder.jpg", "Is a directory"),
    ("x" * 300, "name too long"),
    ("none.jpg", "No such file"),
  ):
    for read in readers:
      with pytest.raises(UserError, match=f"cannot read the image.*{reason}"):
        read(name)
  with pytest.raises(UserError, match=r"cannot read the image.*null"):
    images.read_image_file("a\0b")


def test_symbolic_links_to_regular_files(
  tmp_path: pathlib.Path, readers: Any
) -> None:
  data = samples.encode(np.full((3, 4, 3), 9, np.uint8))
  (tmp_path / "there.png").write_bytes(data)
  (tmp_path / "link.png").symlink_to("there.png")
  bytes_of, pixels_of, record_of = (read("link.png") for read in readers)
  assert bytes_of == data
  assert pixels_of.shape == (3, 4, 3)
  assert record_of.image == data


def test_a_huge_file_is_not_read(tmp_path: pathlib.Path, readers: Any) -> None:
  with open(tmp_path / "sparse.jpg", "wb") as file:
    file.truncate(40_000_000_000)
  for read in readers:
    with pytest.raises(
      UserError, match=r"40,000,000,000 bytes, the limit is 500,000,000"
    ):
      read("sparse.jpg")


def test_bytes_of_any_source_have_the_limit(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(files, "MAX_BYTES", 60)
  data = samples.encode(np.zeros((40, 40, 3), np.uint8))
  with pytest.raises(UserError, match=r"has \d+ bytes, the limit is 60"):
    images.original_size(data)


def test_colors_that_cannot_be_converted(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  file = io.BytesIO()
  Image.new("CMYK", (4, 4)).save(file, "TIFF")
  assert images.prepare_image(file.getvalue(), (4, 4)).min() == 255

  def refuse(*arguments: Any) -> None:
    raise ValueError("illegal conversion")

  monkeypatch.setattr(Image.Image, "convert", refuse)
  with pytest.raises(UserError, match=r"of the kind CMYK.*save it as RGB"):
    images.prepare_image(file.getvalue(), (4, 4))
