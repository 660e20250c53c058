"""Pictures that are cropped, mirrored or recoloured."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from narvl_jax.data.pictures import images

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


def test_no_change_is_bit_equal() -> None:
  for size in ((60, 80), (48, 48)):
    np.testing.assert_array_equal(
      images.prepare_image(PICTURE, size, images.Change()),
      images.prepare_image(PICTURE, size),
    )
  whole = images.Change(crop=(0, 0, 1, 1), color=(1, 1, 1))
  np.testing.assert_array_equal(
    images.prepare_image(PICTURE, (60, 80), whole), PICTURE
  )


def test_crop_is_that_part() -> None:
  change = images.Change(crop=(0.25, 0.5, 0.75, 1.0))
  image = images.prepare_image(PICTURE, (30, 40), change)
  np.testing.assert_array_equal(image, PICTURE[30:60, 20:60])
  whole = images.prepare_image(PICTURE, (60, 80), change)
  assert np.abs(whole[::2, ::2].astype(int) - PICTURE[30:, 20:60]).mean() < 40
  assert (whole != PICTURE).any()
  # In one go with the resize, from a file as from an array.
  buffer = io.BytesIO()
  Image.fromarray(PICTURE).save(buffer, "PNG")
  expected = Image.fromarray(PICTURE).resize(
    (32, 24), Image.Resampling.BICUBIC, box=(20, 30, 60, 60)
  )
  image = images.prepare_image(buffer.getvalue(), (24, 32), change)
  np.testing.assert_array_equal(image, np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 2)])
def test_crop_of_a_tiny_picture(size: tuple[int, int]) -> None:
  picture = np.full((*size, 3), 90, np.uint8)
  for crop in ((0.9, 0.9, 1.0, 1.0), (0, 0, 0.1, 0.1), (0.45, 0.4, 0.5, 0.5)):
    change = images.Change(crop=crop)
    assert (images.prepare_image(picture, (8, 8), change) == 90).all()


def test_flip_mirrors() -> None:
  change = images.Change(flip=True)
  image = images.prepare_image(PICTURE, (60, 80), change)
  np.testing.assert_array_equal(image, PICTURE[:, ::-1])
  small = images.prepare_image(PICTURE, (24, 24), change)
  plain = images.prepare_image(PICTURE, (24, 24))
  difference = small[:, ::-1].astype(int) - plain
  assert np.abs(difference).max() <= 1


def test_color() -> None:
  def changed(*factors: float) -> np.ndarray:
    brightness, contrast, saturation = factors
    change = images.Change(color=(brightness, contrast, saturation))
    return images.prepare_image(PICTURE, (60, 80), change).astype(float)

  np.testing.assert_allclose(changed(0.5, 1, 1), PICTURE // 2, atol=1)
  assert not changed(0, 1, 1).any()
  flat = changed(1, 0, 1)
  assert (flat == flat[0, 0]).all()
  assert flat[0, 0, 0] == pytest.approx(PICTURE.mean(), abs=3)
  grey = changed(1, 1, 0)
  np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
  assert changed(1, 1.5, 1).std() > PICTURE.std()
  # One after another by Pillow, which rounds down; nothing is clipped.
  mild = (PICTURE // 4 + 64).astype(np.uint8)
  image = images.prepare_image(
    mild, (60, 80), images.Change(color=(1.5, 0.5, 1.2))
  )
  expected = Image.fromarray(mild)
  for enhance, factor in (
    (ImageEnhance.Brightness, 1.5),
    (ImageEnhance.Contrast, 0.5),
    (ImageEnhance.Color, 1.2),
  ):
    expected = enhance(expected).enhance(factor)
  difference = np.abs(image.astype(int) - np.asarray(expected))
  assert difference.max() <= 3
  assert difference.mean() < 2


def test_the_array_given_is_not_changed() -> None:
  before = PICTURE.copy()
  images.prepare_image(PICTURE, (60, 80), images.Change(None, True, (0, 0, 0)))
  np.testing.assert_array_equal(PICTURE, before)
