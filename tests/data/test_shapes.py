"""The shapes source: random access, splits, pictures, boxes, mistakes."""

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.sources import load_source
from narvl_jax.data.sources.shapes import ShapesSource, drawing, words
from narvl_jax.data.sources.shapes.scene import Scene
from narvl_jax.data.sources.shapes.source import RANGES
from narvl_jax.errors import UserError

LEVELS = ("easy", "full")


def digest(records) -> str:
  total = hashlib.sha256()
  for r in records:
    total.update(r.image.tobytes())
    total.update(repr((r.id, r.prompt, r.answers, r.box, r.kind)).encode())
  return total.hexdigest()


def some_digests() -> list[str]:
  return [
    digest(
      ShapesSource(task=task, split="train", seed=3, difficulty=level)[5:25]
    )
    for task in TASKS
    for level in LEVELS
  ]


def scenes(task, split, level, count, **options):
  source = ShapesSource(task=task, split=split, difficulty=level, **options)
  return [source.draft(i) for i in range(count)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_record_has_the_schema(task, level):
  source = load_source("shapes", task=task, split="test", difficulty=level)
  assert len(source) == 4000
  for index in (0, 17, 3999):
    record = source[index]
    assert isinstance(record, Record)
    assert record.id == f"shapes-test-{index}"
    assert record.task == task
    assert record.kind
    assert isinstance(record.image, np.ndarray)
    assert record.image.dtype == np.uint8
    assert record.image.shape == (48, 48, 3)
    assert bool(record.prompt) == (task != "caption")
    assert (record.box is not None) == (task == "grounding")
    assert list(record.answers.values()) == [1.0] * (task != "grounding")
  with pytest.raises(IndexError):
    source[4000]
  assert source[-1].id == "shapes-test-3999"
  assert [r.id for r in source[2:4]] == ["shapes-test-2", "shapes-test-3"]


def test_same_records_in_another_process_and_order():
  here = some_digests()
  code = "from tests.data.test_shapes import some_digests as f; print(*f())"
  there = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert there.stdout.split() == here
  assert len(set(here)) == len(here)
  source = ShapesSource(task="vqa", split="train", seed=3)
  backwards = [source[i] for i in reversed(range(5, 25))]
  assert digest(backwards[::-1]) == digest(source[5:25])


def test_random_numbers_of_splits_seeds_and_tasks_do_not_meet():
  spans = []
  for split, seed, task in itertools.product(RANGES, range(3), TASKS):
    source = ShapesSource(task=task, split=split, seed=seed)
    first = source.key(0)
    assert source.key(len(source) - 1) == first + len(source) - 1
    spans.append((first, first + len(source)))
  spans.sort()
  assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_splits_and_seeds_share_no_picture():
  seen = {}
  for split, seed in itertools.product(RANGES, (0, 1)):
    source = ShapesSource(task="caption", split=split, seed=seed)
    for index in range(300):
      image = np.asarray(source[index].image).tobytes()
      assert image not in seen, (split, seed, index, seen[image])
      seen[image] = (split, seed, index)


def mentioned(text: str) -> set[tuple[str, str]]:
  """Colour and shape pairs of neighbouring words."""
  return set(itertools.pairwise(text.replace("?", "").split()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_held_out_combinations_are_only_in_held_out(task, level):
  held_out = set(words.HELD_OUT)
  for split in ("train", "validation", "test"):
    for found in scenes(task, split, level, 500):
      pairs = {(o.color, o.shape) for o in found.scene.objects}
      assert not pairs & held_out
      assert not mentioned(found.prompt) & held_out
      assert not mentioned(found.answer) & held_out
      if found.kind == "color":  # "the star is red"
        named = found.prompt.split()
        assert (named[3], named[1]) not in held_out
  about = 0
  for found in scenes(task, "held_out", level, 500):
    pairs = {(o.color, o.shape) for o in found.scene.objects}
    assert pairs & held_out
    if found.box is not None:
      target = next(o for o in found.scene.objects if o.box == found.box)
      assert (target.color, target.shape) in held_out
    about += bool(mentioned(f"{found.prompt} {found.answer}") & held_out)
  assert about > (500 if task == "caption" else 50) * 0.99


def test_every_color_and_shape_is_seen_with_several_partners():
  for i, values in ((0, words.COLORS), (1, words.SHAPES)):
    held_out = [pair[i] for pair in words.HELD_OUT]
    assert len(set(held_out)) == len(held_out) == 4
    for value in values:
      assert sum(pair[i] == value for pair in words.SEEN) >= 5


@pytest.mark.parametrize("image_size", [32, 48, 96])
@pytest.mark.parametrize("level", LEVELS)
def test_objects_have_room(level, image_size):
  for task in ("caption", "grounding", "entailment"):
    for found in scenes(task, "train", level, 150, image_size=image_size):
      objects = found.scene.objects
      assert 1 <= len(objects) <= (5 if level == "full" else 3)
      boxes = [o.box for o in objects]
      if found.scene.screen is not None:
        boxes.append(found.scene.screen.box)
      for x0, y0, x1, y1 in boxes:
        assert min(x0, y0) >= 1
        assert max(x1, y1) <= image_size - 1
      gap = image_size * (3 if level == "easy" else 2) / 48
      for a, b in itertools.combinations(objects, 2):
        assert abs(a.center(0) - b.center(0)) >= gap
      check_overlap(boxes, objects, level, image_size)


def check_overlap(boxes, objects, level, image_size):
  covered = [0.0] * len(boxes)
  for i, j in itertools.combinations(range(len(boxes)), 2):
    a, b = boxes[i], boxes[j]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if level == "easy" or j >= len(objects):
      # A margin of a thirty-second of the picture, less rounding.
      limit = 0 if level == "full" else 0.25 - image_size / 32
      assert min(width, height) <= 0
      assert min(width, height) <= limit
    elif min(width, height) > 0:
      area = width * height
      areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
      assert area / (sum(areas) - area) <= 0.15
      assert objects[i].color != objects[j].color
      covered[i] += area / areas[0]
  assert max(covered) <= 0.25


def test_sides_at_48_pixels():
  sides = {"small": set(), "large": set()}
  for found in scenes("caption", "train", "easy", 300):
    for item in found.scene.objects:
      sides[item.size].add(item.side)
  assert sides == {"small": {11, 12, 13}, "large": {18, 19, 20, 21}}


@pytest.mark.parametrize("image_size", [48, 96])
def test_boxes_are_tight_around_the_drawn_object(image_size):
  shapes = set()
  for found in scenes("caption", "train", "full", 80, image_size=image_size):
    for item in found.scene.objects:
      background = found.scene.background
      empty = drawing.render(Scene([], None, background), image_size)
      drawn = drawing.render(Scene([item], None, background), image_size)
      rows, columns = np.nonzero((drawn != empty).any(-1))
      x0, y0, x1, y1 = item.box
      shapes.add(item.shape)
      # A pixel that the box touches by a quarter only may stay unchanged.
      assert 0 <= columns.min() - np.floor(x0) <= 1
      assert 0 <= rows.min() - np.floor(y0) <= 1
      assert 0 <= np.ceil(x1) - (columns.max() + 1) <= 1
      assert 0 <= np.ceil(y1) - (rows.max() + 1) <= 1
  assert shapes == set(words.SHAPES)


def test_colors_in_the_middle_of_solid_objects():
  for found in scenes("caption", "train", "easy", 100):
    image = drawing.render(found.scene, 48).astype(int)
    for item in found.scene.objects:
      # Below the middle, where all six shapes have their colour.
      x, y = int(item.center(0)), int(item.y + 0.55 * item.side)
      nearest = min(
        words.RGB, key=lambda c: np.abs(image[y, x] - words.RGB[c]).sum()
      )
      assert nearest == item.color


@pytest.mark.parametrize("level", LEVELS)
def test_every_object_can_be_seen(level):
  for found in scenes("entailment", "train", level, 100):
    scene = found.scene
    image = drawing.render(scene, 48)
    for item in [*scene.objects, scene.screen]:
      if item is None:
        continue
      others = [o for o in scene.objects if o is not item]
      screen = scene.screen if item is not scene.screen else None
      without = drawing.render(Scene(others, screen, scene.background), 48)
      changed = (image != without).any(-1).sum()
      assert changed >= 0.2 * item.side**2


def test_drafts_need_no_pictures_and_few_words(monkeypatch):
  def refuse(*args):
    raise AssertionError(f"drafts must not draw {args}")

  monkeypatch.setattr(drawing, "render", refuse)
  vocabulary = set()
  for level, task in itertools.product(LEVELS, TASKS):
    source = ShapesSource(task=task, split="train", difficulty=level)
    drafts = [source.draft(i) for i in range(600)]
    texts = [x for d in drafts for x in (d.prompt, d.answer) if x]
    assert len(texts) == 600 * (2 if task in ("vqa", "entailment") else 1)
    for text in texts:
      assert text == text.lower().strip()
      vocabulary.update(text.split())
    if task != "caption":
      assert max(len(text.split()) for text in texts) <= 12
  assert 60 < len(vocabulary) <= 120


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"task": "captions"}, r'unknown task "captions".*"caption".*--task,'),
    ({"split": "valid"}, r'unknown split "valid".*"validation".*--split,'),
    ({"difficulty": "eazy"}, r'unknown difficulty "eazy".*"easy"'),
    ({"image_size": 16}, r"from 32 to 512, got 16.*options.image_size"),
    ({"image_size": 48.0}, r"image_size must be a whole number.*48\.0"),
    ({"image_size": True}, r"image_size must be a whole number.*True"),
    ({"seed": -1}, r"seed must be a whole number from 0 to .*, got -1"),
    ({"image_siz": 48}, r'unknown option "image_siz".*"image_size".*options'),
  ],
)
def test_mistakes_are_explained(arguments, message):
  arguments = {"task": "vqa", "split": "train", **arguments}
  with pytest.raises(UserError, match=message):
    load_source("shapes", **arguments)


def test_unknown_source_names_the_nearest():
  with pytest.raises(UserError, match=r'Unknown source "shape".*"shapes"'):
    load_source("shape", task="vqa", split="train")
