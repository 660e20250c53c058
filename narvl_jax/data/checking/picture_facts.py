"""Finds pictures without visible content, for `narvl_jax.check_data`."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from narvl_jax.data.pictures import depth, files

# Differences of channels, of 255: up to the first, a picture has one color;
# above the second, an outline is visible.
_ONE_COLOR = 2
_VISIBLE = 16
# Largest alpha of a transparent pixel, smallest alpha of an opaque one.
_CLEAR, _OPAQUE = 2, 200
# Distances in pixels at which both sides of a soft outline are compared.
_DISTANCES = (2, 4, 8)
_LONG_SIDE = 1024


class PictureFacts(NamedTuple):
  """Facts about a decoded picture.

  Attributes:
    hidden: most of the outline of transparent parts is invisible without
      transparency, as in a black drawing on a transparent ground.
  """

  one_color: bool
  hidden: bool


def examine(data: bytes) -> PictureFacts:
  """Decodes a picture file as for the model.

  Raises:
    UserError: the picture is unreadable, truncated, empty or too large.
  """
  extrema: Any = files.decode(data).getextrema()
  channels = extrema if isinstance(extrema[0], tuple) else (extrema,)
  one_color = all(high - low <= _ONE_COLOR for low, high in channels)
  return PictureFacts(one_color, _is_hidden(data))


def _is_hidden(data: bytes) -> bool:
  picture = files.open_picture(data)
  if not picture.has_transparency_data:
    return False
  files.load(picture, data)
  if depth.is_deep_grey(picture):
    return False
  picture = picture.convert("RGBA")
  factor = _LONG_SIDE / max(picture.size)
  if factor < 1:
    width, height = (max(1, round(side * factor)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.NEAREST)
  return _outline_is_lost(np.asarray(picture).astype(np.int16))


def _outline_is_lost(pixels: np.ndarray) -> bool:
  """Returns whether most of the outline is invisible; pixels [H, W, 4]."""
  total = visible = 0
  for lines in (pixels, pixels.swapaxes(0, 1)):
    clear, opaque = lines[..., 3] <= _CLEAR, lines[..., 3] >= _OPAQUE
    for distance in _DISTANCES:
      left, right = np.s_[:, :-distance], np.s_[:, distance:]
      across = (clear[left] & opaque[right]) | (opaque[left] & clear[right])
      colors = lines[left][across, :3] - lines[right][across, :3]
      total += len(colors)
      visible += int((np.abs(colors).max(axis=-1) > _VISIBLE).sum())
  return 2 * visible < total
