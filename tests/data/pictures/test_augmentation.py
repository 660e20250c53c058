"""Random augmentation: crops, colours, mirrored pictures, answers."""

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest

from narvl_jax.data import tasks
from narvl_jax.data.batches.batching import Batcher
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.pictures import augmentation, images
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
RECORDS = {
  "caption": Record(
    "c", "caption", PICTURE, answers={"a dog": 1.0, "?!": 1.0, "cat": 1.0}
  ),
  "vqa": Record(
    "v",
    "vqa",
    PICTURE,
    prompt="what",
    answers={"dog": 0.3, "cat": 0.9, "cow": 0.6},
  ),
  "grounding": Record(
    "g", "grounding", PICTURE, prompt="the Left dog", box=(8, 6, 20, 40)
  ),
  "entailment": Record(
    "e", "entailment", PICTURE, prompt="a dog", answers={"yes": 1.0}
  ),
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
  texts = [
    text
    for name in TASKS
    for text in tasks.vocabulary_texts(name, {}, [RECORDS[name]] * 3)
  ]
  return Vocabulary.train(texts, 400, num_bins=11)


def _rng(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


@pytest.mark.parametrize("name", TASKS)
def test_off_by_default(vocabulary: Vocabulary, name: str) -> None:
  task = tasks.make_task(name, vocabulary)
  assert not task.augments
  rng = _rng()
  record, change = task.augment(RECORDS[name], rng)
  assert record is RECORDS[name]
  assert change is None
  # No number was drawn.
  assert rng.random() == _rng().random()


@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("caption", {"random_crop": 0.5}),
    ("caption", {"color_jitter": 0.4}),
    ("vqa", {"sample_answer": True}),
    ("vqa", {"random_crop": 0.3, "color_jitter": 1.0, "sample_answer": True}),
    ("grounding", {"flip": True}),
  ],
)
def test_depends_on_the_generator_only(
  vocabulary: Vocabulary, name: str, settings: dict[str, Any]
) -> None:
  task = tasks.make_task(name, vocabulary, settings)
  assert task.augments
  drawn = [task.augment(RECORDS[name], _rng(i)) for i in range(20)]
  again = [task.augment(RECORDS[name], _rng(i)) for i in range(20)]

  def reported(result: tuple[Record, images.Change | None]) -> tuple[Any, ...]:
    record, change = result
    return record.prompt, dict(record.answers), record.box, change

  assert [reported(x) for x in drawn] == [reported(x) for x in again]
  assert len({str(reported(x)) for x in drawn}) > 1
  # The picture is changed where it is decoded.
  assert all(record.image is PICTURE for record, _ in drawn)


@pytest.mark.parametrize("min_area", [0.05, 0.5, 1.0])
def test_random_crop(min_area: float) -> None:
  rng = _rng()
  boxes = np.array(
    [augmentation.random_crop(rng, min_area) for _ in range(500)]
  )
  assert boxes.min() >= 0
  assert boxes.max() <= 1
  width, height = (boxes[:, 2:] - boxes[:, :2]).T
  area, ratio = width * height, width / height
  assert area.min() >= min_area - 1e-9
  assert ratio.max() <= 4 / 3 + 1e-9
  assert ratio.min() >= 3 / 4 - 1e-9
  if min_area == 1:
    np.testing.assert_allclose(boxes, [[0, 0, 1, 1]] * 500)
    return
  # All sizes, shapes and places turn up.
  assert area.min() < min_area + 0.05
  assert area.max() > 0.95
  assert ratio.max() > 1.1
  assert ratio.min() < 0.9
  for start, side in ((boxes[:, 0], width), (boxes[:, 1], height)):
    inside = side < 0.999
    place = start[inside] / (1 - side[inside])
    assert np.histogram(place, 4, (0, 1))[0].min() > 0.15 * inside.sum()


def test_color_factors() -> None:
  rng = _rng()
  factors = np.array([augmentation.color_factors(rng, 0.3) for _ in range(300)])
  assert factors.shape == (300, 3)
  assert factors.min() >= 0.7
  assert factors.max() <= 1.3
  assert (factors.min(axis=0) < 0.75).all()
  assert (factors.max(axis=0) > 1.25).all()
  assert (factors[:, 0] != factors[:, 1]).all()


def test_a_prompt_of_any_length_costs_its_record_only(
  vocabulary: Vocabulary,
) -> None:
  task = tasks.make_task("grounding", vocabulary, {"flip": True})
  record = dataclasses.replace(RECORDS["grounding"], prompt="x" * 1_000_001)
  for seed in range(4):
    new, change = task.augment(record, np.random.default_rng(seed))
    assert (new, change) == (record, None)
  with pytest.raises(UserError, match=r"1,000,\d+ characters, the limit is"):
    task.encode(record)


def test_draw_answer() -> None:
  rng = _rng()
  scores = {"a": 0.3, "b": 0.6, "c": 0.9}
  counts = collections.Counter(
    augmentation.draw_answer(rng, scores) for _ in range(3000)
  )
  for answer, score in scores.items():
    assert counts[answer] / 3000 == pytest.approx(score / 1.8, abs=0.03)
  assert augmentation.draw_answer(rng, {"only": 0.1}) == "only"


def test_sampled_vqa_answer_has_its_own_confidence(
  vocabulary: Vocabulary,
) -> None:
  task = tasks.make_task("vqa", vocabulary, {"sample_answer": True})
  seen = {}
  for seed in range(40):
    record, change = task.augment(RECORDS["vqa"], _rng(seed))
    assert change is None
    encoded = task.encode(record)
    seen[vocabulary.decode(encoded.label_ids)] = encoded.confidence
  assert seen == {" dog": 0.3, " cat": 0.9, " cow": 0.6}


def test_sampled_caption_is_never_an_empty_one(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("caption", vocabulary, {"sample_answer": True})
  seen = set()
  for seed in range(40):
    record, _ = task.augment(RECORDS["caption"], _rng(seed))
    seen.add(vocabulary.decode(task.encode(record).label_ids))
  assert seen == {" a dog", " cat"}
  for answers in ({}, {"?!": 1.0}):
    bad = dataclasses.replace(RECORDS["caption"], answers=answers)
    record, _ = task.augment(bad, _rng())
    with pytest.raises(UserError, match=r"has no answer|is empty"):
      task.encode(record)


def _flipped(
  task: tasks.Task[Any], record: Record
) -> list[tuple[Record, images.Change | None]]:
  results = [task.augment(record, _rng(seed)) for seed in range(200)]
  return [result for result in results if result[1] is not None]


def test_flip(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("grounding", vocabulary, {"flip": True})
  flipped = _flipped(task, RECORDS["grounding"])
  assert 70 < len(flipped) < 130
  record, change = flipped[0]
  assert change == images.Change(flip=True)
  assert record.prompt == "the Right dog"
  assert record.box == (60, 6, 72, 40)
  # The box shows what it showed before.
  image = images.prepare_image(record.image, (60, 80), change)
  np.testing.assert_array_equal(image[6:40, 60:72], PICTURE[6:40, 19:7:-1])
  assert (
    task.encode(record).label_ids != task.encode(RECORDS["grounding"]).label_ids
  )
  for prompt in ("the l dog", "at 10 o\u2019clock", "leftish dog"):
    unsure = dataclasses.replace(RECORDS["grounding"], prompt=prompt)
    assert not _flipped(task, unsure)
    # Picture, text and box stay together.
    kept, change = task.augment(unsure, _rng(1))
    assert kept is unsure
    assert change is None


def test_flip_of_a_bad_box(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("grounding", vocabulary, {"flip": True})
  for box, message in (
    (None, "has no box"),
    ((5, 5, 5, 9), "x0 < x1"),
    ((5, 5, 500, 9), "outside its picture"),
  ):
    bad = dataclasses.replace(RECORDS["grounding"], box=box)
    with pytest.raises(UserError, match=message):
      _flipped(task, bad)


def test_vocabulary_knows_the_words_of_mirrored_pictures() -> None:
  record = [RECORDS["grounding"]]
  assert len(list(tasks.vocabulary_texts("grounding", {}, record))) == 1
  texts = list(tasks.vocabulary_texts("grounding", {"flip": True}, record))
  assert "the left dog" in texts[0]
  assert "the right dog" in texts[1]


def test_a_batch_has_picture_text_and_labels_of_one_change(
  vocabulary: Vocabulary,
) -> None:
  record = RECORDS["grounding"]
  batcher = Batcher((60, 80), 60, 8)

  def written(task: tasks.Task[Any], seed: int | None) -> dict[str, Any]:
    batch = batcher.empty(1)
    rng = None if seed is None else _rng(seed)
    batcher.write(batch, 0, record, task, rng=rng)
    return batch

  task = tasks.make_task("grounding", vocabulary, {"flip": True})
  plain, mirrored = written(task, None), None
  np.testing.assert_array_equal(plain["image"][0], PICTURE)
  for seed in range(6):
    batch = written(task, seed)
    if (batch["image"][0] == PICTURE).all():
      for key in ("text", "labels"):
        np.testing.assert_array_equal(batch[key], plain[key])
    else:
      mirrored = batch
      np.testing.assert_array_equal(batch["image"][0], PICTURE[:, ::-1])
  assert mirrored is not None
  ids = [i for i in mirrored["labels"][0].tolist() if i != vocabulary.pad_id]
  assert task.decode(ids, (80, 60)) == (64, 6, 72, 42)
  assert (mirrored["text"] != plain["text"]).any()
