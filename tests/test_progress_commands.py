"""Long activities show what they do and count to their end."""

import json
import pathlib
from typing import Any

import pytest

from narvl_jax.data.answers import collect_answers
from narvl_jax.data.checking import inspection
from narvl_jax.data.sources import load_source
from narvl_jax.data.tasks import make_task
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.experiment import vocabulary as run_vocabulary
from narvl_jax.experiment.config import default_config
from narvl_jax.terminal import progress
from narvl_jax.terminal.activity import Activity
from tests.data import converting
from tests.support.tiny import tiny_config

Shown = list[Activity]


@pytest.fixture
def shown(monkeypatch) -> Shown:
  """Returns the activities that are shown during a test."""
  found = []

  class Noted(Activity):
    def __init__(self, *args: Any, **settings: Any) -> None:
      super().__init__(*args, **settings)
      found.append(self)

  monkeypatch.setattr(progress, "Activity", Noted)
  return found


def _told(shown: Shown) -> list[tuple[str, int, int | None, str]]:
  return [(x.text, x.done, x.total, x.unit) for x in shown]


def test_rows_that_are_found(shown, tmp_path):
  path = tmp_path / "rows.jsonl"
  rows = [{"image": "a.png", "prompt": "what?", "answer": "red"}] * 50
  text = "".join(json.dumps(row) + "\n" for row in rows)
  path.write_text(text)
  load_source("jsonl", task="vqa", split="train", path=str(path))
  assert _told(shown) == [
    ("finding the rows of rows.jsonl", len(text), len(text), "bytes")
  ]


def test_records_that_are_checked(shown):
  source = load_source("shapes", task="vqa", split="test")
  vocabulary = Vocabulary.train([" what color"], 400)
  task = make_task("vqa", vocabulary, dict(default_config("vqa").tasks.vqa))
  inspection.inspect(source, task, inspection.Limits(), max_examples=100)
  assert _told(shown) == [("checking", 100, 100, "records")]


def test_answers_that_are_collected(shown):
  source = load_source("shapes", task="vqa", split="test")
  collect_answers(source, "vqa", max_examples=30)
  assert _told(shown) == [("collecting answers", 30, 30, "records")]


def test_texts_that_a_vocabulary_is_trained_on(shown, monkeypatch):
  monkeypatch.setattr(run_vocabulary, "_VOCABULARY_RECORDS", 20)
  run_vocabulary.make_vocabulary(tiny_config())
  ((text, done, total, unit),) = _told(shown)
  assert (text, total, unit) == ("training the vocabulary", None, "texts")
  assert done >= 40


def test_records_that_are_converted(shown, tmp_path: pathlib.Path):
  converting.convert(tmp_path / "new", shards=4)
  assert _told(shown) == [("writing grounding-test", 12, 12, "records")]
