"""Pictures: any file or array to uint8 [H, W, 3], as the reference does it.

Decoding is Pillow's `convert("RGB")`: alpha is dropped, palettes are looked
up, the orientation tag is ignored. Resizing is bicubic to the exact size,
the aspect ratio is not kept. Beyond the reference: 16-bit and float greys are
scaled to 8 bits (the reference clips them to white), truncated files are
refused (the reference fills the rest with grey), and so are huge ones.
"""

import dataclasses
import io
import os
import pathlib
import re
import warnings
from typing import Any, cast

import numpy as np
from PIL import Image

from narvl_jax.errors import UserError

# Just under the size at which Pillow itself warns of a decompression bomb.
MAX_PIXELS = 80_000_000
# Refused here, with an error of our own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Shares of red, green and blue in a grey; as Pillow has them.
_GREY = (0.299, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class Change:
  """What augmentation does to one picture; nothing by default.

  Attributes:
    crop: the part that is kept: x0, y0, x1, y1 as fractions of width and
      height.
    flip: mirror left and right.
    color: factors of brightness, contrast and saturation; 1 keeps each.
  """

  crop: tuple[float, float, float, float] | None = None
  flip: bool = False
  color: tuple[float, float, float] | None = None


def read_image_file(path: str | os.PathLike[str]) -> bytes:
  """Returns the bytes of a picture file.

  Raises:
    UserError: there is no such file or it cannot be read.
  """
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as e:
    reason = e.strerror or str(e)
    raise UserError(
      f'cannot read the image "{path}": {reason}; set --image to a JPEG or'
      " PNG file"
    ) from e


def original_size(image: bytes | np.ndarray) -> tuple[int, int]:
  """Returns (width, height) of a picture without decoding it.

  Raises:
    UserError: the picture is no picture, empty or too large.
  """
  if isinstance(image, np.ndarray):
    _check_array(image)
    return image.shape[1], image.shape[0]
  return _open(image).size


def prepare_image(
  image: bytes | np.ndarray,
  size: tuple[int, int],
  change: Change | None = None,
) -> np.ndarray:
  """Returns a picture as uint8 [height, width, 3].

  Args:
    image: encoded file, or uint8 [H, W, 3]. An array of the right size is
      returned as it is, not copied, unless there is a change.
    size: (height, width) in pixels.
    change: crop, flip and colours; None leaves the picture as it is.

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
    picture = _decode(image)
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
  if change is not None:
    # Last, where there are the fewest pixels.
    picture = _flip_and_color(picture, change)
  return np.asarray(picture)


def normalize(image: np.ndarray) -> np.ndarray:
  """Returns uint8 pixels as float32 in [-1, 1], same shape."""
  scaled = image.astype(np.float32) / np.float32(255)
  return (scaled - np.float32(0.5)) / np.float32(0.5)


def _flip_and_color(picture: Image.Image, change: Change) -> Image.Image:
  if change.flip:
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if change.color is not None:
    picture = _color(picture, *change.color)
  return picture


def _color(
  picture: Image.Image, brightness: float, contrast: float, saturation: float
) -> Image.Image:
  """Applies the three factors as one matrix, a quarter of the time of three.

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
  _check_size(image.shape[1], image.shape[0])


def _check_size(width: int, height: int) -> None:
  if width < 1 or height < 1:
    raise UserError(f"the image is empty: {width} x {height} pixels")
  if width * height > MAX_PIXELS:
    raise UserError(
      f"the image has {width} x {height} pixels; the limit is {MAX_PIXELS:,}"
      " pixels in all, please scale it down"
    )


def _open(data: bytes) -> Image.Image:
  """Reads the header."""
  if not data:
    raise UserError("the image is empty: 0 bytes")
  try:
    picture = Image.open(io.BytesIO(data))
  except Image.DecompressionBombError as e:
    seen = re.search(r"\d+", str(e))
    pixels = f"{int(seen[0]):,}" if seen else "too many"
    raise UserError(
      f"the image has {pixels} pixels; the limit is {MAX_PIXELS:,} pixels in"
      " all, please scale it down"
    ) from e
  except Image.UnidentifiedImageError as e:
    raise UserError(
      f"the image is in no known format: {len(data)} bytes that begin with"
      f" {data[:8]!r}; use a JPEG or PNG file"
    ) from e
  except Exception as e:  # A damaged header fails in any of many ways.
    raise UserError(
      f"the image's header is damaged or cut off ({len(data)} bytes): {e}"
    ) from e
  _check_size(*picture.size)
  return picture


def _decode(data: bytes) -> Image.Image:
  picture = _open(data)
  try:
    picture.load()
  except Exception as e:  # Damaged data fails in any of many ways.
    raise UserError(
      f"the image is damaged or cut off ({len(data)} bytes): {e}"
    ) from e
  if picture.mode == "RGB":
    return picture
  if picture.mode == "F" or picture.mode.startswith("I"):
    return _to_8_bits(picture).convert("RGB")
  return picture.convert("RGB")


def _to_8_bits(picture: Image.Image) -> Image.Image:
  """Scales greys of more than 8 bits: [0, 65535], or [0, 1] if they are so."""
  pixels = np.asarray(picture).astype(np.float64)
  pixels = np.nan_to_num(pixels, nan=0.0, posinf=65535.0, neginf=0.0)
  top = 65535.0
  if picture.mode == "F" and pixels.max() <= 1.0:
    top = 1.0
  elif picture.mode == "F" and pixels.max() <= 255.0:
    top = 255.0
  scaled = np.rint(np.clip(pixels / top, 0, 1) * 255)
  return Image.fromarray(scaled.astype(np.uint8))
