"""Converts pictures of more than 8 bits a channel to 8 bits.

The largest value of the picture determines the value that becomes white:

| picture          | largest value | white  |
| ---------------- | ------------- | ------ |
| float            | up to 1       | 1      |
| float, 16 bits   | up to 255     | 255    |
| float, 16 bits   | larger        | 65,535 |

For a float picture this is the largest finite value; +inf is white.

A picture of 16 bits without values above 255 is assumed to hold 8-bit values:
on the 16-bit scale it would be black. A larger value does not determine the
scale, so a dark picture stays dark.
"""

import sys
from typing import Any

import numpy as np
from PIL import Image

# Number of pixels to scale at a time.
_STRIP_PIXELS = 1 << 20
_WHITE = 65535.0


def is_deep_grey(picture: Image.Image) -> bool:
  """Returns whether a picture has one channel of more than 8 bits."""
  return picture.mode == "F" or picture.mode.startswith("I")


def to_8_bits(picture: Image.Image) -> Image.Image:
  """Scales a picture of one deep channel to 8 bits, mode "L".

  Works on strips of rows, so that it needs one byte a pixel. Values are clipped
  to the range; NaN becomes black.
  """
  width, height = picture.size
  rows = max(1, _STRIP_PIXELS // width)

  def strip(start: int) -> np.ndarray:
    part = picture.crop((0, start, width, min(start + rows, height)))
    values = np.asarray(part).astype(np.float32)
    return np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=0.0)

  starts = range(0, height, rows)
  strips = map(strip, starts)
  most = max(x.max(initial=0.0, where=np.isfinite(x)) for x in strips)
  if picture.mode == "F" and most <= 1:
    top = np.float32(1)
  else:
    top = np.float32(255 if most <= 255 else _WHITE)
  grey = np.empty((height, width), np.uint8)
  for start in starts:
    shares = np.clip(strip(start) / top, 0, 1)
    grey[start : start + rows] = np.rint(shares * np.float32(255))
  return Image.fromarray(grey)


def low_byte_tiles(picture: Image.Image) -> list[Any]:
  """Returns Pillow's tiles for the low bytes of a picture of 16-bit colours.

  Pillow decodes the high byte of each value, which is 0 if the picture contains
  8-bit values. The list is empty if the picture has no 16-bit colours.
  """
  tiles: list[Any] = list(getattr(picture, "tile", ()))
  changed = [_low_byte_tile(tile) for tile in tiles]
  return [] if None in changed else changed


def is_black(picture: Image.Image) -> bool:
  """Returns whether all colours of a decoded RGB or RGBA picture are 0."""
  extrema: Any = picture.getextrema()
  return not any(high for _, high in extrema[:3])


def decode_low_bytes(picture: Image.Image, tiles: list[Any]) -> Image.Image:
  """Decodes the low bytes of an opened picture, given its `low_byte_tiles`."""
  vars(picture)["tile"] = tiles
  picture.load()
  if _raw_mode(tiles[0]) == "RGBA":
    # Grey with alpha: the second of four bytes is the low byte of the grey.
    return picture.getchannel("G")
  return picture


def _low_byte_tile(tile: Any) -> Any:
  mode, arguments = _low_byte_mode(_raw_mode(tile)), tile[3]
  if mode is None:
    return None
  changed = mode if isinstance(arguments, str) else (mode, *arguments[1:])
  return type(tile)(*tile[:3], changed)


def _raw_mode(tile: Any) -> str:
  """Returns Pillow's name for the layout of the bytes, such as "RGB;16B"."""
  arguments = tile[3]
  first = arguments[:1] if isinstance(arguments, tuple) else (arguments,)
  return next((mode for mode in first if isinstance(mode, str)), "")


def _low_byte_mode(raw_mode: str) -> str | None:
  """Returns the layout that selects the other byte of each value."""
  if raw_mode == "LA;16B":
    return "RGBA"
  name, _, order = raw_mode.partition(";16")
  if name not in ("RGB", "RGBA") or order not in ("L", "B", "N"):
    return None
  little = sys.byteorder == "little" if order == "N" else order == "L"
  return f"{name};16{'B' if little else 'L'}"
