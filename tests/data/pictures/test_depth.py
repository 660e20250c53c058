"""Pictures of more than 8 bits: the white value, and memory."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data.pictures import depth, images
from tests.data.pictures import samples


def _values(channels: int, top: int = 255) -> np.ndarray:
  rng = np.random.default_rng(channels)
  values = rng.integers(0, top + 1, (5, 7, channels)).astype(np.uint16)
  values[0, 0] = top
  return values


def _colors(values: np.ndarray) -> np.ndarray:
  """Returns the expected pixels without alpha: [H, W, 3]."""
  colors = values[..., : 1 if values.shape[2] < 3 else 3]
  return np.broadcast_to(colors, (*values.shape[:2], 3)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits(channels: int) -> None:
  values = _values(channels)
  for factor in (1, 257):
    # Values of 8 bits, and the same on the scale of 16.
    data = samples.png_16(values * factor)
    image = images.prepare_image(data, (5, 7))
    np.testing.assert_array_equal(image, _colors(values))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
def test_tiff_of_16_bits(channels: int, order: str, compressed: bool) -> None:
  values = _values(channels)
  for factor in (1, 257):
    data = samples.tiff_16(values * factor, order, compressed)
    image = images.prepare_image(data, (5, 7))
    np.testing.assert_array_equal(image, _colors(values))


def test_a_dark_picture_stays_dark() -> None:
  """4,095 may or may not be the white of 12 bits."""
  for channels in (1, 3):
    values = _values(channels, 4095)
    image = images.prepare_image(samples.png_16(values), (5, 7))
    assert image.max() in (15, 16)
  image = images.prepare_image(
    samples.png_16(np.full((2, 2, 1), 256, np.uint16)), (2, 2)
  )
  assert (image == 1).all()


def test_black_of_16_bits() -> None:
  for channels in (1, 2, 3, 4):
    data = samples.png_16(np.zeros((2, 3, channels), np.uint16))
    assert not images.prepare_image(data, (2, 3)).any()


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
  rng = np.random.default_rng(0)
  for pixels in (
    rng.integers(0, 65536, (37, 11)).astype(np.uint16),
    rng.random((37, 11)).astype(np.float32),
    rng.integers(0, 256, (37, 11)).astype(np.uint16),
  ):
    # The largest value is in the last row.
    pixels[-1, -1] = pixels.max()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF")
    whole = images.prepare_image(file.getvalue(), (37, 11))
    for size in (1, 30, 11 * 36):
      with monkeypatch.context() as patch:
        patch.setattr(depth, "_STRIP_PIXELS", size)
        parts = images.prepare_image(file.getvalue(), (37, 11))
      np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize("scale", [1.0, 200.0, 60_000.0])
def test_infinite_values_do_not_make_the_scale(scale: float) -> None:
  """They are white or black and do not affect other pixels."""
  pixels = np.full((4, 5), scale, np.float32)
  pixels[1] = scale / 2
  pixels[2] = 0
  expected = np.asarray(depth.to_8_bits(Image.fromarray(pixels)))
  pixels[3, :3] = np.inf, -np.inf, np.nan
  grey = np.asarray(depth.to_8_bits(Image.fromarray(pixels)))
  np.testing.assert_array_equal(grey[:3], expected[:3])
  assert grey[3, :3].tolist() == [255, 0, 0]
  alone = np.full((2, 2), np.inf, np.float32)
  assert (np.asarray(depth.to_8_bits(Image.fromarray(alone))) == 255).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_memory_is_bounded(dtype: type) -> None:
  """Needs one byte a pixel and a few strips, not floats for all pixels."""
  side = 4096
  picture = Image.fromarray(np.full((side, side), 7, dtype))
  tracemalloc.start()
  grey = depth.to_8_bits(picture)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert grey.mode == "L"
  assert peak < 2.5 * side * side + (16 << 20)
