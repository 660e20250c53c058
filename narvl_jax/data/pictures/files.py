"""Picture files that may come from anywhere: read, opened, decoded.

Only the decoders of `FORMATS` are ever called, whatever the bytes are. A file
is read only if it is a regular one of at most `MAX_BYTES`; a picture is decoded
only if it has at most `MAX_PIXELS`. Messages never quote what a file holds.
"""

import io
import os
import re
import warnings
from typing import Any

# Imported for their decoders, which Pillow otherwise looks up by importing all.
from PIL import Image, TiffImagePlugin, WebPImagePlugin

from narvl_jax.data.pictures import depth
from narvl_jax.errors import UserError
from narvl_jax.files.regular import read_regular

# As Pillow names them. MPO (pictures of phones and stereo cameras) is opened by
# the decoder of JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Just under the size at which Pillow itself warns of a decompression bomb.
MAX_PIXELS = 80_000_000
# What so many pixels of three 16-bit colours take without compression, and a
# little more for headers.
MAX_BYTES = 500_000_000
# `ignore` as the reference does; `apply` turns the picture upright.
EXIF_ORIENTATIONS = ("ignore", "apply")

# What is refused here is told by an error of our own, and odd metadata is no
# reason to write to the terminal.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")
_PLUGINS = (TiffImagePlugin, WebPImagePlugin)
_ORIENTATION_TAG = 0x0112
_Turn = Image.Transpose
# Value of the tag -> what makes the picture upright.
_TURNS = {
  2: _Turn.FLIP_LEFT_RIGHT,
  3: _Turn.ROTATE_180,
  4: _Turn.FLIP_TOP_BOTTOM,
  5: _Turn.TRANSPOSE,
  6: _Turn.ROTATE_270,
  7: _Turn.TRANSVERSE,
  8: _Turn.ROTATE_90,
}
_OPPOSITE = {
  _Turn.ROTATE_270: _Turn.ROTATE_90,
  _Turn.ROTATE_90: _Turn.ROTATE_270,
}
# A PNG file without any of these has no orientation, wherever its chunks are.
_PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# First bytes -> what people take for a picture.
_OTHER_KINDS = {
  rb"....ftyp(?:hei|hev|mif1|msf1)": "a HEIC file",
  rb"....ftypavi": "an AVIF file",
  rb"%PDF": "a PDF file",
  rb"%!PS|\xc5\xd0\xd3\xc6": "a PostScript (EPS) file",
  rb"(?:\xef\xbb\xbf)?\s*<(?:svg|\?xml)": "an SVG or XML file",
  rb"(?i:\s*<(?:!doctype )?html)": "a web page",
  rb"version https://git-lfs": "a pointer of Git LFS",
  rb"8BPS": "a Photoshop file",
  rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "a JPEG 2000 file",
}


class Upright(bytes):
  """An encoded picture that is turned as its EXIF orientation says.

  Plain bytes are decoded as they are stored. Like these, it can be stored,
  pickled and compared.
  """


def with_orientation(image: Any, setting: str) -> Any:
  """Returns a picture whose EXIF orientation is treated as a setting says.

  Args:
    image: encoded picture; an array is returned as it is.
    setting: one of `EXIF_ORIENTATIONS`.
  """
  if not isinstance(image, bytes) or isinstance(image, Upright):
    return image
  return Upright(image) if setting == "apply" else image


def read_image_file(
  path: str | os.PathLike[str],
  advice: str = "set --image to a picture file, such as JPEG or PNG",
) -> bytes:
  """Returns the bytes of a picture file.

  Args:
    path: a regular file, or a symbolic link to one.
    advice: what to do if it cannot be read.

  Raises:
    UserError: there is no such file, it cannot be read, is not a regular file
      or too large.
  """
  try:
    return read_regular(path, MAX_BYTES)
  except (OSError, ValueError) as e:
    reason = getattr(e, "strerror", None) or str(e)
    raise UserError(
      f'cannot read the image "{path}": {reason}; {advice}'
    ) from e


def open_picture(data: bytes) -> Image.Image:
  """Returns a picture of which only the header was read.

  Raises:
    UserError: it is in none of `FORMATS`, damaged, empty or too large.
  """
  if not data:
    raise UserError("the image is empty: 0 bytes")
  if len(data) > MAX_BYTES:
    raise UserError(
      f"the image has {len(data):,} bytes, the limit is {MAX_BYTES:,}"
    )
  try:
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
  except Image.DecompressionBombError as e:
    seen = re.search(r"\d+", str(e))
    pixels = f"{int(seen[0]):,}" if seen else "too many"
    raise UserError(
      f"the image has {pixels} pixels; the limit is {MAX_PIXELS:,} pixels in"
      " all, please scale it down"
    ) from e
  except Image.UnidentifiedImageError as e:
    raise UserError(
      f"the image is in no known format: {len(data)} bytes{_other_kind(data)};"
      " use a JPEG or PNG file (or WebP, GIF, BMP, TIFF, MPO)"
    ) from e
  except Exception as e:  # A damaged header fails in any of many ways.
    raise UserError(
      f"the image's header is damaged or cut off ({len(data)} bytes):"
      f" {_reason(e)}"
    ) from e
  check_size(*picture.size)
  return picture


def check_size(width: int, height: int) -> None:
  """Raises UserError for a picture without pixels, or with too many."""
  if width < 1 or height < 1:
    raise UserError(f"the image is empty: {width} x {height} pixels")
  if width * height > MAX_PIXELS:
    raise UserError(
      f"the image has {width} x {height} pixels; the limit is {MAX_PIXELS:,}"
      " pixels in all, please scale it down"
    )


def _other_kind(data: bytes) -> str:
  for pattern, kind in _OTHER_KINDS.items():
    if re.match(pattern, data[:64], re.DOTALL):
      return f" that look like {kind}"
  return ""


def _reason(error: Exception) -> str:
  """Returns what a decoder reports, without what it quotes of the file."""
  text = re.sub(r"""b?'[^']*'|b?"[^"]*\"""", "...", str(error))
  return text or type(error).__name__


def orientation(picture: Image.Image, data: bytes) -> int:
  """Returns the EXIF orientation of a picture that is not decoded yet.

  Args:
    picture: of `open_picture`.
    data: what it was opened from.

  Returns:
    1 (upright, also without a tag or with a damaged one) to 8.
  """
  # Pillow would decode a whole PNG file to look behind its pixels.
  if picture.format == "PNG" and not any(mark in data for mark in _PNG_MARKS):
    return 1
  try:
    value = picture.getexif().get(_ORIENTATION_TAG)
  except Exception:  # Damaged metadata fails in any of many ways.
    return 1
  return value if isinstance(value, int) and value in _TURNS else 1


def picture_size(data: bytes) -> tuple[int, int]:
  """Returns (width, height) of a picture as `decode` returns it.

  Raises:
    UserError: see `open_picture`.
  """
  picture = open_picture(data)
  width, height = stored_size(picture)
  if isinstance(data, Upright) and orientation(picture, data) >= 5:
    return height, width
  return width, height


def stored_size(picture: Image.Image) -> tuple[int, int]:
  """Returns (width, height) before any orientation is applied."""
  if isinstance(picture, TiffImagePlugin.TiffImageFile):
    # Pillow applies the orientation of this format, and of no other.
    tags = picture.tag_v2
    return tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
  return picture.size


def decode(data: bytes) -> Image.Image:
  """Returns a picture of 8 bits, in mode "L" (grey) or "RGB".

  Alpha is dropped and palettes are looked up. The orientation is that of the
  stored pixels, whatever the format, or upright for `Upright`.

  Raises:
    UserError: see `open_picture`; or the picture is damaged or cut off.
  """
  picture = open_picture(data)
  turn = _turn(picture, data)
  low_bytes = depth.low_byte_tiles(picture)
  load(picture, data)
  if depth.is_deep_grey(picture):
    picture = depth.to_8_bits(picture)
  elif low_bytes and depth.is_black(picture):
    picture = depth.decode_low_bytes(open_picture(data), low_bytes)
  if picture.mode not in ("L", "RGB"):
    picture = _to_rgb(picture)
  return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image) -> Image.Image:
  try:
    return picture.convert("RGB")
  except Exception as e:  # What Pillow cannot do differs between versions.
    raise UserError(
      f"the image has colours of the kind {picture.mode}, which cannot be"
      " converted; save it as RGB"
    ) from e


def _turn(picture: Image.Image, data: bytes) -> Image.Transpose | None:
  """Returns how a picture is turned after Pillow has decoded it."""
  upright = isinstance(data, Upright)
  turned = picture.format == "TIFF"
  if upright == turned:
    return None
  turn = _TURNS.get(orientation(picture, data))
  if turn is None or upright:
    return turn
  return _OPPOSITE.get(turn, turn)


def load(picture: Image.Image, data: bytes) -> Image.Image:
  """Decodes an opened picture and returns it.

  Raises:
    UserError: it is damaged or cut off.
  """
  try:
    picture.load()
  except Exception as e:  # Damaged data fails in any of many ways.
    raise UserError(
      f"the image is damaged or cut off ({len(data)} bytes): {_reason(e)}"
    ) from e
  return picture
