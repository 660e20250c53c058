"""The published easy-VQA data: counts, splits, kinds, mistakes."""

import collections
import functools
import hashlib
import importlib
import io
import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data.example import Record
from narvl_jax.data.pictures.images import prepare_image
from narvl_jax.data.sources import easy_vqa, load_source
from narvl_jax.errors import UserError

COUNTS = {"train": 34788, "validation": 3787, "test": 9673}
IMAGES = {"train": 3600, "validation": 400, "test": 1000}
SHAPES = {"circle", "rectangle", "triangle"}
COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


@functools.cache
def source(split: str, **options: Any) -> Any:
  pytest.importorskip("easy_vqa")
  return load_source("easy_vqa", task="vqa", split=split, **options)


def digests(split: str) -> set[str]:
  return {hashlib.sha256(record.image).hexdigest() for record in source(split)}


@pytest.mark.parametrize("split", COUNTS)
def test_counts(split: str) -> None:
  assert len(source(split)) == COUNTS[split]
  assert len(digests(split)) == IMAGES[split]
  assert len({record.id for record in source(split)}) == COUNTS[split]


def test_full_train_is_the_published_split() -> None:
  full = source("train", full_train=True)
  parts = [r.id for split in ("train", "validation") for r in source(split)]
  assert len(full) == len(parts) == 38575
  assert {record.id for record in full} == set(parts)
  package = pytest.importorskip("easy_vqa")
  questions, answers, _ = package.get_train_questions()
  assert [record.prompt for record in full] == questions
  assert [list(record.answers) for record in full] == [[a] for a in answers]


def test_splits_share_no_picture() -> None:
  for a, b in itertools.combinations(COUNTS, 2):
    assert not digests(a) & digests(b), (a, b)


def test_record_has_the_schema() -> None:
  package = pytest.importorskip("easy_vqa")
  questions, answers, images = package.get_test_questions()
  paths = package.get_test_image_paths()
  for index in (0, 5000, COUNTS["test"] - 1):
    record = source("test")[index]
    assert isinstance(record, Record)
    assert record.id == f"easy_vqa-test-{index}"
    assert record.task == "vqa"
    assert record.prompt == questions[index]
    assert record.answers == {answers[index]: 1.0}
    assert record.box is None
    assert record.objects is None
    with open(paths[images[index]], "rb") as file:
      assert record.image == file.read()
    assert isinstance(record.image, bytes)
    assert Image.open(io.BytesIO(record.image)).size == (64, 64)
    assert prepare_image(record.image, (48, 48)).shape == (48, 48, 3)


def test_random_access() -> None:
  records = source("validation")
  last = records[len(records) - 1]
  assert records[-1] == records[np.int64(len(records) - 1)] == last
  assert records[3:9:2] == [records[3], records[5], records[7]]
  for index in (len(records), -len(records) - 1):
    with pytest.raises(IndexError):
      records[index]


@pytest.mark.parametrize("split", COUNTS)
def test_kinds(split: str) -> None:
  answers = collections.defaultdict(collections.Counter)
  for record in source(split):
    answers[record.kind].update(record.answers)
    denies = {"not", "no"} & set(record.prompt.rstrip("?").split())
    assert (record.kind == "absence") == bool(denies), record.prompt
  assert set(answers) == {"color", "shape", "existence", "absence"}
  assert set(answers["color"]) == COLORS
  assert set(answers["shape"]) == SHAPES
  for kind in ("existence", "absence"):
    assert set(answers[kind]) == {"yes", "no"}


def test_answers_fit_the_picture() -> None:
  """All answers about one picture have the same shape and colour."""
  reported = collections.defaultdict(set)
  for record in source("validation"):
    (answer,) = record.answers
    words = set(record.prompt.rstrip("?").split())
    if record.kind in ("color", "shape"):
      words, seen = {answer} | words & (SHAPES | COLORS), True
    else:
      seen = (answer == "yes") == (record.kind == "existence")
      words &= SHAPES | COLORS
    if seen:
      reported[record.image] |= words
  assert len(reported) > 350
  for words in reported.values():
    assert len(words & SHAPES) <= 1
    assert len(words & COLORS) <= 1


def test_few_words() -> None:
  records = source("train")
  words = {
    w for r in records for x in (r.prompt, *r.answers) for w in x.split()
  }
  assert words > SHAPES | COLORS | {"yes", "no"}
  assert len(words) < 60


def test_seed_has_no_effect() -> None:
  named = load_source("easy_vqa", task="vqa", split="validation", seed=7)
  assert named[:50] == source("validation")[:50]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"task": "caption"}, r'questions only, not task "caption".*task=vqa'),
    (
      {"split": "val"},
      r'unknown split "val"\. Valid: test, train, validation\.',
    ),
    (
      {"split": "test", "full_train": True},
      r'is for split "train", got "test"\. Drop options.full_train',
    ),
    (
      {"split": "validation", "full_train": True},
      r'is for split "train", got "validation"',
    ),
    ({"fulltrain": True}, r'unknown option "fulltrain".*"full_train"'),
  ],
)
def test_mistakes_are_explained(
  arguments: dict[str, Any], message: str
) -> None:
  with pytest.raises(UserError, match=message):
    load_source("easy_vqa", **{"task": "vqa", "split": "train", **arguments})


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
  real = importlib.import_module

  def without_package(name: str) -> Any:
    if name == "easy_vqa":
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name)

  monkeypatch.setattr(easy_vqa.importlib, "import_module", without_package)
  easy_vqa._load.cache_clear()
  message = r"not installed\. Run: pip install easy-vqa"
  with pytest.raises(UserError, match=message):
    load_source("easy_vqa", task="vqa", split="train")
  monkeypatch.undo()
  # Nothing about the failure is kept.
  pytest.importorskip("easy_vqa")
  assert len(load_source("easy_vqa", task="vqa", split="test")) == 9673
