"""What the model cannot see in a picture, for `narvl_jax.check_data`."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from narvl_jax.data.pictures import depth, files

# Difference of colours, of 255, below which people see one colour.
_ONE_COLOR = 2
_VISIBLE = 16
# Alpha up to which a pixel is transparent, and from which it is opaque.
_CLEAR, _OPAQUE = 2, 200
# Pixels between what is compared across an outline, on either side of its soft
# edge.
_DISTANCES = (2, 4, 8)
_LONG_SIDE = 1024


class PictureFacts(NamedTuple):
  """What a picture is like once it is decoded.

  Attributes:
    one_color: all of it has one colour, or nearly so.
    hidden: it has transparent parts, and most of their outline cannot be seen
      without transparency, such as a black drawing on a transparent ground.
  """

  one_color: bool
  hidden: bool


def examine(data: bytes) -> PictureFacts:
  """Decodes a picture file as for the model, and looks at it.

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
  """Returns whether colours tell opaque from transparent parts; [H, W, 4]."""
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
