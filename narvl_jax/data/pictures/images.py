"""Converts picture files and arrays to uint8 [H, W, 3], as the reference does.

Decoding is Pillow's `convert("RGB")`: alpha is dropped, palettes are looked
up, the orientation tag is ignored unless the picture is `Upright`. Resizing is
bicubic to the exact size without keeping the aspect ratio. Differences from the
reference: 16-bit and float greys are scaled to 8 bits (the reference clips them
to white); truncated files are rejected (the reference fills the rest with
grey), and so are huge ones.
"""

import dataclasses
from typing import Any, cast

import numpy as np
from PIL import Image

from narvl_jax.data.pictures import files
from narvl_jax.data.pictures.files import Upright as Upright
from narvl_jax.data.pictures.files import read_image_file as read_image_file
from narvl_jax.data.pictures.files import with_orientation as with_orientation
from narvl_jax.errors import UserError

# Shares of red, green and blue in a grey, as in Pillow.
_GREY = (0.299, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class Change:
  """Augmentation of one picture; none by default.

  Attributes:
    crop: x0, y0, x1, y1 as fractions of width and height.
    flip: whether to mirror left and right.
    color: factors of brightness, contrast and saturation; 1 has no effect.
  """

  crop: tuple[float, float, float, float] | None = None
  flip: bool = False
  color: tuple[float, float, float] | None = None


def original_size(image: bytes | np.ndarray) -> tuple[int, int]:
  """Returns (width, height) of a picture, usually without decoding it.

  Raises:
    UserError: the picture is invalid, empty or too large.
  """
  if isinstance(image, np.ndarray):
    _check_array(image)
    return image.shape[1], image.shape[0]
  return files.picture_size(image)


def orientation(image: bytes | np.ndarray) -> int:
  """Returns the EXIF orientation of a picture, 1 (upright) to 8.

  Raises:
    UserError: the picture is invalid, empty or too large.
  """
  if isinstance(image, np.ndarray):
    return 1
  return files.orientation(files.open_picture(image), image)


def prepare_image(
  image: bytes | np.ndarray, size: tuple[int, int], change: Change | None = None
) -> np.ndarray:
  """Returns a picture as uint8 [height, width, 3].

  Args:
    image: encoded file, or uint8 [H, W, 3]. An array of the right size is
      returned without a copy unless there is a change.
    size: (height, width) in pixels.
    change: crop, flip and colours; None has no effect.

  Raises:
    UserError: the picture is unreadable, truncated, empty or too large.
  """
  height, width = size
  if isinstance(image, np.ndarray):
    same = image.shape == (height, width, 3) and image.dtype == np.uint8
    if same and change is None:
      return image
    _check_array(image)
    picture = Image.fromarray(image)
  else:
    picture = files.decode(image)
  box = None
  if change is not None and change.crop is not None:
    x0, y0, x1, y1 = change.crop
    box = (
      x0 * picture.width,
      y0 * picture.height,
      x1 * picture.width,
      y1 * picture.height,
    )
  if box is not None or picture.size != (width, height):
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
  if picture.mode != "RGB":
    # Converted after resizing: a grey picture takes less memory.
    picture = picture.convert("RGB")
  if change is not None and change.flip:
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if change is not None and change.color is not None:
    picture = _color(picture, *change.color)
  return np.asarray(picture)


def _color(
  picture: Image.Image, brightness: float, contrast: float, saturation: float
) -> Image.Image:
  """Applies the three factors as one matrix.

  Contrast is relative to the mean grey, saturation to the grey of each pixel.
  """
  grey = (1 - saturation) * np.array(_GREY)
  turn = saturation * np.eye(3) + grey[None, :]
  mean = np.average(np.arange(256), weights=picture.convert("L").histogram())
  matrix = np.empty((3, 4))
  matrix[:, :3] = contrast * brightness * turn
  matrix[:, 3] = (1 - contrast) * brightness * mean
  values = matrix.ravel().tolist()
  return picture.convert("RGB", cast(Any, tuple(values)))


def _check_array(image: np.ndarray) -> None:
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise UserError(
      f"the image is an array {image.dtype}{list(image.shape)}; it must be"
      " uint8 [height, width, 3]"
    )
  files.check_size(image.shape[1], image.shape[0])
