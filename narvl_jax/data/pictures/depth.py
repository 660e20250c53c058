"""Pictures of more than 8 bits a channel become pictures of 8 bits.

Which value becomes white follows from the largest value of the picture:

| picture          | largest value | white  |
| ---------------- | ------------- | ------ |
| float            | up to 1       | 1      |
| float, 16 bits   | up to 255     | 255    |
| float, 16 bits   | larger        | 65,535 |

Of a float picture the largest finite value counts; +inf is white.

A picture of 16 bits without a value above 255 holds values of 8 bits: on the
scale of 16 bits all of it would be black, so that nothing is lost by reading it
so. A larger value tells nothing about the scale: a dark picture stays dark.
"""

import sys
from typing import Any

import numpy as np
from PIL import Image

# Pixels that are scaled at a time.
_STRIP_PIXELS = 1 << 20
_WHITE = 65535.0


def is_deep_grey(picture: Image.Image) -> bool:
  """Returns whether a picture has one channel of more than 8 bits."""
  return picture.mode == "F" or picture.mode.startswith("I")


def to_8_bits(picture: Image.Image) -> Image.Image:
  """Scales a picture of one deep channel to 8 bits.

  It works on a strip of rows at a time, so that it takes one byte a pixel.
  Values outside the range are moved to its ends; NaN becomes black.

  Args:
    picture: see `is_deep_grey`.

  Returns:
    A picture in mode "L".
  """
  width, height = picture.size
  rows = max(1, _STRIP_PIXELS // width)

  def strip(start: int) -> np.ndarray:
    part = picture.crop((0, start, width, min(start + rows, height)))
    values = np.asarray(part).astype(np.float32)
    return np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=0.0)

  starts = range(0, height, rows)
  most = max(_largest_finite(strip(start)) for start in starts)
  top = np.float32(_top_value(most, is_float=picture.mode == "F"))
  grey = np.empty((height, width), np.uint8)
  for start in starts:
    shares = np.clip(strip(start) / top, 0, 1)
    grey[start : start + rows] = np.rint(shares * np.float32(255))
  return Image.fromarray(grey)


def _largest_finite(values: np.ndarray) -> float:
  return float(values.max(initial=0.0, where=np.isfinite(values)))


def _top_value(most: float, *, is_float: bool) -> float:
  if is_float and most <= 1:
    return 1.0
  return 255.0 if most <= 255 else _WHITE


def low_byte_tiles(picture: Image.Image) -> list[Any]:
  """Returns how to decode the low bytes of a picture of 16-bit colours.

  Pillow decodes the high byte of each value, which is 0 wherever the picture
  holds values of 8 bits.

  Args:
    picture: opened, not decoded yet.

  Returns:
    For `decode_low_bytes`; empty if the picture has no 16-bit colours.
  """
  tiles: list[Any] = list(getattr(picture, "tile", ()))
  changed = [_low_byte_tile(tile) for tile in tiles]
  return [] if None in changed else changed


def is_black(picture: Image.Image) -> bool:
  """Returns whether every color channel of a decoded picture is 0.

  Args:
    picture: in mode "RGB" or "RGBA".
  """
  extrema: Any = picture.getextrema()
  return not any(high for _, high in extrema[:3])


def decode_low_bytes(picture: Image.Image, tiles: list[Any]) -> Image.Image:
  """Decodes the low bytes of a picture of 16-bit colours.

  Args:
    picture: opened, not decoded yet.
    tiles: of `low_byte_tiles`.
  """
  vars(picture)["tile"] = tiles
  picture.load()
  if _raw_mode(tiles[0]) == "RGBA":
    # Grey with alpha: the second of four bytes is the low one of the grey.
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
  """Returns the layout that has the other byte of each value."""
  if raw_mode == "LA;16B":
    return "RGBA"
  name, _, order = raw_mode.partition(";16")
  if name not in ("RGB", "RGBA") or order not in ("L", "B", "N"):
    return None
  little = sys.byteorder == "little" if order == "N" else order == "L"
  return f"{name};16{'B' if little else 'L'}"
