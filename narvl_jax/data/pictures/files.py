"""Reads, opens and decodes picture files from untrusted sources.

Only the decoders of `FORMATS` are ever called. A file is read only if it is a
regular file of at most `MAX_BYTES`; a picture is decoded only if it has at most
`MAX_PIXELS`. Messages never quote the content of a file.
"""

import io
import os
import re
import warnings
from typing import Any

# Imported for their decoders; Pillow would otherwise import all of its plugins.
from PIL import Image, TiffImagePlugin, WebPImagePlugin

from narvl_jax.data.pictures import depth
from narvl_jax.errors import UserError
from narvl_jax.files import store_cache
from narvl_jax.files.regular import read_regular
from narvl_jax.files.stores import as_path, is_remote

# Pillow's names. The JPEG decoder also opens MPO (phones and stereo cameras).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Just below the size at which Pillow warns about a decompression bomb.
MAX_PIXELS = 80_000_000
# That many pixels of three 16-bit colours without compression, plus headers.
MAX_BYTES = 500_000_000
# `ignore` matches the reference; `apply` turns the picture upright.
EXIF_ORIENTATIONS = ("ignore", "apply")

# Oversized pictures raise an error below; odd metadata needs no warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")
_PLUGINS = (TiffImagePlugin, WebPImagePlugin)
_ORIENTATION_TAG = 0x0112
_Turn = Image.Transpose
# Value of the tag -> transposition that makes the picture upright.
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
# A PNG file without any of these has no orientation.
_PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# First bytes -> kinds of files that are mistaken for supported pictures.
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
  """An encoded picture to which its EXIF orientation is applied.

  The orientation of plain bytes is ignored.
  """


def with_orientation(image: Any, setting: str) -> Any:
  """Marks an encoded picture as `Upright` if the EXIF `setting` is "apply"."""
  if not isinstance(image, bytes) or isinstance(image, Upright):
    return image
  return Upright(image) if setting == "apply" else image


def read_image_file(
  path: str | os.PathLike[str],
  advice: str = "set --image to a picture file, such as JPEG or PNG",
) -> bytes:
  """Returns the bytes of a picture file; `advice` ends the error message.

  Raises:
    UserError: the file does not exist, cannot be read, is not a regular file
      or is too large.
  """
  try:
    place = as_path(path)
    if is_remote(place):
      return store_cache.read_bytes(place, MAX_BYTES)
    return read_regular(place, MAX_BYTES)
  except (OSError, ValueError) as e:
    reason = getattr(e, "strerror", None) or str(e)
    raise UserError(
      f'cannot read the image "{path}": {reason}; {advice}'
    ) from e


def open_picture(data: bytes) -> Image.Image:
  """Opens a picture by reading only its header.

  Raises:
    UserError: it has none of `FORMATS`, is damaged, empty or too large.
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
  except Exception as e:  # Damaged headers raise errors of many types.
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
  """Returns the message of a decoder without its quotes of the file."""
  text = re.sub(r"""b?'[^']*'|b?"[^"]*\"""", "...", str(error))
  return text or type(error).__name__


def orientation(picture: Image.Image, data: bytes) -> int:
  """Returns the EXIF orientation of a picture that is not decoded yet.

  Args:
    picture: from `open_picture`.

  Returns:
    1 (upright, also if the tag is missing or damaged) to 8.
  """
  # Pillow would decode a whole PNG file to find chunks behind its pixels.
  if picture.format == "PNG" and not any(mark in data for mark in _PNG_MARKS):
    return 1
  try:
    value = picture.getexif().get(_ORIENTATION_TAG)
  except Exception:  # Damaged metadata raises errors of many types.
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
    # Pillow applies the orientation of this format only.
    tags = picture.tag_v2
    return tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
  return picture.size


def decode(data: bytes) -> Image.Image:
  """Decodes a picture to 8 bits, in mode "L" (grey) or "RGB".

  Alpha is dropped and palettes are looked up. The orientation is that of the
  stored pixels in every format, or upright for `Upright`.

  Raises:
    UserError: see `open_picture`; or the picture is damaged or truncated.
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
  except Exception as e:  # The error depends on the version of Pillow.
    raise UserError(
      f"the image has colours of the kind {picture.mode}, which cannot be"
      " converted; save it as RGB"
    ) from e


def _turn(picture: Image.Image, data: bytes) -> Image.Transpose | None:
  """Returns the transposition to apply after Pillow has decoded a picture."""
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
    UserError: it is damaged or truncated.
  """
  try:
    picture.load()
  except Exception as e:  # Damaged data raises errors of many types.
    raise UserError(
      f"the image is damaged or cut off ({len(data)} bytes): {_reason(e)}"
    ) from e
  return picture
