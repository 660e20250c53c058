"""Encoded pictures for tests."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
# Of every format that keeps an EXIF orientation.
TAGGED_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "MPO")
_LOSSLESS: dict[str, dict[str, Any]] = {
  "JPEG": {"quality": 100, "subsampling": 0},
  "MPO": {"quality": 100, "subsampling": 0, "save_all": True},
  "WEBP": {"lossless": True},
}
# What makes a picture upright, written out again.
_UPRIGHT = {
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: x[::-1].swapaxes(0, 1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


def smooth(width: int = 40, height: int = 24) -> np.ndarray:
  """Returns uint8 [height, width, 3], smooth enough for JPEG."""
  rng = np.random.default_rng(0)
  small = rng.integers(0, 256, (3, 5, 3), np.uint8)
  return np.asarray(Image.fromarray(small).resize((width, height)))


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Returns pixels with the orientation of a tag applied."""
  return _UPRIGHT.get(orientation, lambda x: x)(pixels)


def sideways(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Returns pixels that the orientation of a tag turns into the given ones."""
  opposite = {6: 8, 8: 6}.get(orientation, orientation)
  return upright(pixels, opposite)


def encode(
  pixels: np.ndarray, kind: str = "PNG", orientation: int = 0, **options: Any
) -> bytes:
  """Returns an encoded picture, with an orientation tag unless it is 0."""
  picture = Image.fromarray(pixels)
  options = {**_LOSSLESS.get(kind, {}), **options}
  if orientation:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options["exif"] = exif
  if kind == "MPO":
    options["append_images"] = [picture]
  file = io.BytesIO()
  picture.save(file, kind, **options)
  return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
  """Returns a chunk of a PNG file."""
  check = struct.pack(">I", zlib.crc32(name + body))
  return struct.pack(">I", len(body)) + name + body + check


def png_16(values: np.ndarray) -> bytes:
  """Returns a PNG of 16 bits: [H, W, C], C of grey, grey+alpha, RGB, RGBA."""
  height, width, channels = values.shape
  kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
  return b"".join(
    (
      b"\x89PNG\r\n\x1a\n",
      chunk(b"IHDR", header),
      chunk(b"IDAT", zlib.compress(rows)),
      chunk(b"IEND", b""),
    )
  )


def tiff_16(
  values: np.ndarray, order: str = "<", compressed: bool = False
) -> bytes:
  """Returns a TIFF of 16 bits: [H, W, C], C of grey, RGB, RGBA."""
  height, width, channels = values.shape
  body = values.astype(order + "u2").tobytes()
  body = zlib.compress(body) if compressed else body
  color = 2 if channels >= 3 else 1
  after = 8 + 2 + 12 * (10 if channels == 4 else 9) + 4
  start = after + 2 * channels

  def short(value: int) -> bytes:
    return struct.pack(order + "HH", value, 0)

  def long(value: int) -> bytes:
    return struct.pack(order + "I", value)

  bits = short(16) if channels == 1 else long(after)
  tags = [
    (256, 3, 1, short(width)),
    (257, 3, 1, short(height)),
    (258, 3, channels, bits),
    (259, 3, 1, short(8 if compressed else 1)),
    (262, 3, 1, short(color)),
    (273, 4, 1, long(start)),
    (277, 3, 1, short(channels)),
    (278, 3, 1, short(height)),
    (279, 4, 1, long(len(body))),
  ]
  if channels == 4:
    tags.append((338, 3, 1, short(2)))
  head = (b"II*\0" if order == "<" else b"MM\0*") + long(8)
  entries = b"".join(
    struct.pack(order + "HHI", *tag[:3]) + tag[3] for tag in tags
  )
  count = struct.pack(order + "H", len(tags))
  depths = struct.pack(order + "H" * channels, *[16] * channels)
  return head + count + entries + long(0) + depths + body
