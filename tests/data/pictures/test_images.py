"""Pictures: every kind of file, sizes, and parity with the reference."""

import io
import json
import pathlib
import struct
import subprocess
import sys
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from narvl_jax.data.pictures import images
from narvl_jax.errors import UserError
from narvl_jax.models.encoder import normalize_image
from tests.conftest import ROOT


def _encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
  buffer = io.BytesIO()
  picture.save(buffer, kind, **options)
  return buffer.getvalue()


def _noise(height: int = 40, width: int = 60) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def _normalize(image: np.ndarray) -> np.ndarray:
  """Returns pixels in [-1, 1], computed as in the official code."""
  scaled = image.astype(np.float32) / np.float32(255)
  return (scaled - np.float32(0.5)) / np.float32(0.5)


def test_pixels_as_reference(shared_files: pathlib.Path) -> None:
  arrays = np.load(shared_files / "fixtures" / "image_preprocess.npz")
  for name in "ab":
    pixels = arrays[f"pixels_{name}"]
    for size in (96, 160):
      for kind in ("square_resize", "refcoco"):
        key = f"{name}_{size}_{kind}"
        expected = arrays[f"{key}_uint8"].transpose(1, 2, 0)
        image = images.prepare_image(pixels, (size, size))
        np.testing.assert_array_equal(image, expected)
        encoded = _encode(Image.fromarray(pixels))
        same = images.prepare_image(encoded, (size, size))
        np.testing.assert_array_equal(same, expected)
        row = _normalize(image)[0].T
        np.testing.assert_allclose(
          row, arrays[f"{key}_float_row0"], rtol=0, atol=1e-6
        )


def test_whole_pictures_as_reference(shared_files: pathlib.Path) -> None:
  """At the sizes of the tasks: 480 pixels, and 512 for grounding."""
  folder = shared_files / "fixtures"
  arrays = np.load(folder / "image_preprocess.npz")
  for name in "ab":
    for side in (480, 512):
      image = images.prepare_image(arrays[f"pixels_{name}"], (side, side))
      values = _normalize(image).transpose(2, 0, 1)
      np.testing.assert_array_equal(
        values[:, ::37, ::41],
        arrays[f"{name}_{side}_square_resize_float_sampled"],
      )
  rows = json.loads((folder / "text_pipeline.json").read_text())["image"]
  assert len(rows) == 6
  for row in rows:
    pixels = arrays[f"pixels_{row['image']}"]
    image = images.prepare_image(pixels, (row["size"], row["size"]))
    values = _normalize(image).astype(np.float64)
    assert list(values.transpose(2, 0, 1).shape) == row["shape"]
    assert values.sum() == pytest.approx(row["sum"], rel=1e-9)
    if "abs_sum" in row:
      assert np.abs(values).sum() == pytest.approx(row["abs_sum"], rel=1e-9)
    else:
      assert (values.min(), values.max()) == (row["min"], row["max"])


def test_pixels_are_normalized_on_the_device_as_reference() -> None:
  pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
  values = np.asarray(normalize_image(jnp.asarray(pixels)))
  assert values.dtype == np.float32
  assert (values.min(), values.max()) == (-1, 1)
  np.testing.assert_allclose(values, _normalize(pixels), rtol=0, atol=1e-6)


def test_array_of_the_right_size_is_not_copied() -> None:
  array = _noise()
  assert images.prepare_image(array, (40, 60)) is array


@pytest.mark.parametrize("size", [(40, 60), (24, 48), (81, 17), (1, 1)])
def test_shape_and_order_of_axes(size: tuple[int, int]) -> None:
  pixels = np.zeros((40, 60, 3), np.uint8)
  pixels[:, 30:, 0] = 255
  pixels[20:, :, 2] = 255
  image = images.prepare_image(_encode(Image.fromarray(pixels)), size)
  assert image.shape == (*size, 3)
  assert image.dtype == np.uint8
  if min(size) > 1:
    assert image[0, 0].tolist() == [0, 0, 0]
    assert image[0, -1].tolist() == [255, 0, 0]
    assert image[-1, 0].tolist() == [0, 0, 255]


def test_one_pixel() -> None:
  pixel = np.full((1, 1, 3), 77, np.uint8)
  for image in (pixel, _encode(Image.fromarray(pixel))):
    assert images.original_size(image) == (1, 1)
    assert (images.prepare_image(image, (8, 9)) == 77).all()


def test_original_size() -> None:
  pixels = _noise(40, 60)
  assert images.original_size(pixels) == (60, 40)
  assert images.original_size(_encode(Image.fromarray(pixels))) == (60, 40)


def test_jpeg_and_orientation_tag() -> None:
  picture = Image.fromarray(np.full((20, 30, 3), 90, np.uint8))
  exif = picture.getexif()
  exif[0x0112] = 6
  data = _encode(picture, "JPEG", exif=exif)
  # As the reference: the tag is ignored.
  assert images.original_size(data) == (30, 20)
  image = images.prepare_image(data, (20, 30))
  assert np.abs(image.astype(int) - 90).max() <= 2


def test_alpha_is_dropped() -> None:
  pixels = np.zeros((4, 4, 4), np.uint8)
  pixels[..., 0] = 200
  data = _encode(Image.fromarray(pixels))
  assert (images.prepare_image(data, (4, 4)) == [200, 0, 0]).all()


def test_palette() -> None:
  colors = np.array([[255, 0, 0], [0, 128, 0]], np.uint8)
  indices = (np.arange(16).reshape(4, 4) % 2).astype(np.uint8)
  picture = Image.fromarray(indices, "P")
  picture.putpalette(colors.tobytes())
  for kind in ("PNG", "GIF"):
    image = images.prepare_image(_encode(picture, kind), (4, 4))
    np.testing.assert_array_equal(image, colors[indices])
  with_hole = _encode(picture, transparency=0)
  image = images.prepare_image(with_hole, (4, 4))
  np.testing.assert_array_equal(image, colors[indices])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr"])
def test_other_modes(mode: str) -> None:
  picture = Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode)
  data = _encode(picture, "PNG" if mode in ("1", "L", "LA") else "TIFF")
  image = images.prepare_image(data, (4, 6))
  assert image.min() >= 254


def test_16_bit_grey() -> None:
  values = np.array([[0, 257, 32896, 65535]], np.uint16)
  data = _encode(Image.fromarray(values))
  assert Image.open(io.BytesIO(data)).mode.startswith("I")
  image = images.prepare_image(data, (1, 4))
  assert image[0, :, 0].tolist() == [0, 1, 128, 255]
  assert (image == image[..., :1]).all()


def test_16_bit_color() -> None:
  rows = struct.pack(">B6H", 0, 0, 257, 65535, 32896, 0, 65535)
  data = b"\x89PNG\r\n\x1a\n"
  header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
  for name, body in (
    (b"IHDR", header),
    (b"IDAT", zlib.compress(rows)),
    (b"IEND", b""),
  ):
    check = zlib.crc32(name + body)
    data += (
      struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)
    )
  image = images.prepare_image(data, (1, 2))
  assert image[0].tolist() == [[0, 1, 255], [128, 0, 255]]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_grey(top: float) -> None:
  values = np.array([[0, 0.2, 1]], np.float32) * top
  data = _encode(Image.fromarray(values.astype(np.float32)), "TIFF")
  image = images.prepare_image(data, (1, 3))
  assert image[0, :, 0].tolist() == [0, 51, 255]
  nan = _encode(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
  assert not images.prepare_image(nan, (2, 2)).any()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated(kind: str) -> None:
  data = _encode(Image.fromarray(_noise(200, 200)), kind)
  assert images.prepare_image(data, (8, 8)).shape == (8, 8, 3)
  with pytest.raises(UserError, match="damaged or cut off"):
    images.prepare_image(data[: len(data) // 2], (8, 8))
  # The header is whole.
  assert images.original_size(data[: len(data) // 2]) == (200, 200)


def test_no_picture() -> None:
  with pytest.raises(UserError, match="is empty: 0 bytes"):
    images.prepare_image(b"", (8, 8))
  with pytest.raises(UserError, match=r"no known format: 9 bytes; use a JPEG"):
    images.prepare_image(b"some text", (8, 8))
  with pytest.raises(UserError, match=r"no known format|header is damaged"):
    images.prepare_image(b"\x89PNG\r\n\x1a\n", (8, 8))
  header = _encode(Image.fromarray(_noise()), "JPEG")[:30]
  with pytest.raises(UserError, match=r"header is damaged or .*\(30 bytes\)"):
    images.prepare_image(header, (8, 8))


def _png_of_size(width: int, height: int) -> bytes:
  """A header of a picture that is too large to decode."""
  data = bytearray(_encode(Image.new("L", (1, 1))))
  data[16:24] = struct.pack(">II", width, height)
  data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
  return bytes(data)


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_very_large(side: int) -> None:
  data = _png_of_size(side, side)
  with pytest.raises(UserError, match=r"has (9000 x|12000 x|3,600,000,000)"):
    images.prepare_image(data, (8, 8))
  with pytest.raises(UserError, match="limit is 80,000,000 pixels"):
    images.original_size(data)


def test_one_message_about_size(tmp_path: pathlib.Path) -> None:
  """Pillow does not add its own warning."""
  path = tmp_path / "large.png"
  path.write_bytes(_png_of_size(10_000, 10_000))
  program = (
    "from narvl_jax.data.pictures import images\n"
    f"data = open({str(path)!r}, 'rb').read()\n"
    "try: images.original_size(data)\n"
    "except ValueError as error: print(error)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
  )
  assert "10000 x 10000 pixels" in done.stdout
  assert done.stderr == ""


@pytest.mark.parametrize(
  ("array", "message"),
  [
    (np.zeros((4, 4), np.uint8), r"uint8\[4, 4\]; it must be"),
    (np.zeros((4, 4, 4), np.uint8), r"uint8\[4, 4, 4\]; it must be"),
    (np.zeros((4, 4, 3), np.float32), r"float32\[4, 4, 3\]; it must be"),
    (np.zeros((0, 4, 3), np.uint8), "is empty: 4 x 0 pixels"),
  ],
)
def test_bad_arrays(array: np.ndarray, message: str) -> None:
  for size in ((8, 8), (4, 4)):
    with pytest.raises(UserError, match=message):
      images.prepare_image(array, size)
  with pytest.raises(UserError, match=message):
    images.original_size(array)


def test_read_image_file(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.png"
  path.write_bytes(b"12")
  assert images.read_image_file(path) == b"12"
  message = r"nothing.png\": No such file.*--image"
  with pytest.raises(UserError, match=message):
    images.read_image_file(tmp_path / "nothing.png")
  with pytest.raises(UserError, match="Is a directory"):
    images.read_image_file(tmp_path)
