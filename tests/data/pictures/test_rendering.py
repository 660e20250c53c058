"""The grid and the overlay: layout, wrapping and boxes in the right place."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from narvl_jax.data.pictures import rendering

FONT = ImageFont.load_default(14)


def _panel(**kwargs) -> rendering.Panel:
  fields = {
    "image": np.full((48, 48, 3), 128, np.uint8),
    "title": "vqa / count",
    "prompt": "how many circles are there?",
    "prediction": "2 (93 %)",
    "target": "3",
    "correct": False,
  }
  return rendering.Panel(**(fields | kwargs))


def _pixels_of(picture: Image.Image, colour: rendering.Colour) -> np.ndarray:
  """Returns (y, x) of the pixels of exactly one colour, [K, 2]."""
  return np.argwhere(np.all(np.asarray(picture) == colour, axis=-1))


@pytest.mark.parametrize(
  "text",
  [
    "a small red square left of the large blue striped circle",
    "x" * 200,
    "word " + "y" * 90 + " word",
    " ".join(["many"] * 200),
  ],
)
def test_wrapped_lines_fit_and_keep_the_text(text):
  lines = rendering.wrap(text, FONT, 240)
  assert 1 < len(lines) <= 6
  assert all(FONT.getlength(line) <= 240 for line in lines)
  joined = "".join(lines).replace(" ", "")
  letters = text.replace(" ", "")
  if joined.endswith("..."):
    assert letters.startswith(joined[:-3])
    assert len(joined) < len(letters)
  else:
    assert joined == letters


def test_empty_text_wraps_to_one_empty_line():
  assert rendering.wrap("", FONT, 100) == [""]


def test_grid_has_room_for_every_panel():
  one = rendering.prediction_grid([_panel()], title="run", columns=2)
  two = rendering.prediction_grid([_panel()] * 2, title="run", columns=2)
  three = rendering.prediction_grid([_panel()] * 3, title="run", columns=2)
  assert one.height == two.height
  assert three.height > two.height + 256
  assert two.width >= 2 * 256


def test_long_prompts_make_the_row_higher():
  short = rendering.prediction_grid([_panel(), _panel()], title="run")
  long = rendering.prediction_grid(
    [_panel(), _panel(prompt="how many circles " * 8)], title="run"
  )
  assert long.height >= short.height + 18


def test_overlay_draws_both_boxes_at_their_scaled_places():
  image = np.zeros((64, 128, 3), np.uint8)
  picture = rendering.box_overlay(
    image, (16.0, 8.0, 48.0, 40.0), target_box=(64.0, 16.0, 120.0, 60.0)
  )
  # 128 pixels grow by 4; the legend is below the picture.
  for colour, box in (
    (rendering.PREDICTION_COLOUR, (64, 32, 192, 160)),
    (rendering.TARGET_COLOUR, (256, 64, 480, 240)),
  ):
    found = _pixels_of(picture, colour)
    found = found[found[:, 0] < 64 * 4]
    low, high = found.min(0), found.max(0)
    np.testing.assert_allclose((*low[::-1], *high[::-1]), box, atol=2)


def test_target_is_dashed_and_prediction_is_solid():
  image = np.zeros((64, 64, 3), np.uint8)
  box = (8.0, 8.0, 56.0, 56.0)
  solid = rendering.box_overlay(image, box)
  dashed = rendering.box_overlay(image, (0.0, 0.0, 0.0, 0.0), target_box=box)
  n_solid = len(_pixels_of(solid.crop((0, 0, 512, 512)), (214, 69, 0)))
  n_dashed = len(_pixels_of(dashed.crop((0, 0, 512, 512)), (0, 98, 204)))
  assert 0.4 * n_solid < n_dashed < 0.7 * n_solid


def test_legend_names_the_target_only_if_there_is_one():
  image = np.zeros((64, 64, 3), np.uint8)
  alone = rendering.box_overlay(image, (8.0, 8.0, 56.0, 56.0))
  assert len(_pixels_of(alone, rendering.TARGET_COLOUR)) == 0


@pytest.mark.parametrize(
  "shape", [(1, 1), (1, 3000), (3000, 1), (300, 200), (4000, 3000)]
)
def test_any_image_size_is_drawn(shape):
  image = np.zeros((*shape, 3), np.uint8)
  box = (0.0, 0.0, float(shape[1]), float(shape[0]))
  overlay = rendering.box_overlay(image, box, caption="the thing")
  assert max(overlay.size) < 1750
  grid = rendering.prediction_grid(
    [_panel(image=image, predicted_box=box, target_box=box)], title="run"
  )
  assert grid.mode == "RGB"


def test_boxes_turned_inside_out_are_drawn():
  image = np.zeros((64, 64, 3), np.uint8)
  straight = rendering.box_overlay(image, (8.0, 8.0, 56.0, 40.0))
  turned = rendering.box_overlay(image, (56.0, 40.0, 8.0, 8.0))
  np.testing.assert_array_equal(np.asarray(straight), np.asarray(turned))


def test_the_legend_is_there_for_boxes_only():
  box = (8.0, 8.0, 40.0, 40.0)
  plain = rendering.prediction_grid([_panel()] * 2, title="run")
  boxed = rendering.prediction_grid(
    [_panel(), _panel(predicted_box=box)], title="run"
  )
  assert boxed.height == plain.height + 18
  assert len(_pixels_of(plain, rendering.PREDICTION_COLOUR)) == 0
  above = [y for y, _ in _pixels_of(boxed, rendering.PREDICTION_COLOUR)]
  assert min(above) < 48


def test_titles_and_notes_use_the_lines_that_they_need():
  one = rendering.prediction_grid([_panel()] * 2, title="run")
  more = rendering.prediction_grid(
    [_panel()] * 2, title="a long title " * 12, note="a note"
  )
  assert more.width == one.width
  assert more.height >= one.height + 2 * 18
