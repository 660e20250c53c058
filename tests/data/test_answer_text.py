"""The spelling of answers, and the scores of annotators."""

import base64
import itertools
import json
import pathlib
from typing import Any

import pytest

from narvl_jax.data import answers as answer_lists
from narvl_jax.data import tasks
from narvl_jax.data.answer_text import (
  annotator_scores,
  normalize_answer,
  normalized_answers,
)
from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.example import Record
from narvl_jax.data.shards import records
from narvl_jax.data.shards.distilled import Label, relabel
from narvl_jax.data.sources import load_source
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.evaluation.caption import CaptionMatch
from narvl_jax.evaluation.entailment import EntailmentAccuracy
from narvl_jax.evaluation.vqa import VqaAccuracy
from tests.data.sources import tsv_files
from tests.data.task_records import PICTURE, make_vocabulary

# Spellings of one answer.
RED_DOG = [
  "red dog",
  "red dog ",
  "\tred  dog\n",
  "red\u00a0dog",
  "\u3000red dog\r",
  "\ufeffred dog\u200b",
]
CAFE = ["caf\u00e9", "cafe\u0301", " cafe\u0301 "]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
  return make_vocabulary()


def _record(task: str = "vqa", **fields: Any) -> Record:
  return Record("1", task, PICTURE, prompt="what?", **fields)


@pytest.mark.parametrize("text", RED_DOG)
def test_normalize(text: str) -> None:
  assert normalize_answer(text) == "red dog"


INVISIBLE = [
  *("\u00ad", "\u061c", "\u180e", "\u200b", "\u200e", "\u200f", "\ufeff"),
  *(chr(code) for code in (*range(0x202A, 0x202F), *range(0x2060, 0x2065))),
  *(chr(code) for code in range(0x2066, 0x2070)),
]


def test_normalize_removes_invisible_characters_without_meaning() -> None:
  for character in INVISIBLE:
    for text in (f"red{character} dog", f"r{character}ed dog{character}"):
      assert normalize_answer(text) == "red dog", ascii(character)
  # Combined after the characters between them are removed.
  assert normalize_answer("cafe\u00ad\u0301") == CAFE[0]


@pytest.mark.parametrize(
  "text", ["a\u200db", "a\u200cb", "\u2764\ufe0f", "\U0001f468\u200d\U0001f33e"]
)
def test_normalize_keeps_joiners(text: str) -> None:
  assert normalize_answer(text) == text


def test_time_of_normalizing_is_bounded() -> None:
  """Composing such a prediction would take minutes and hang the run."""
  marks = "a" + "\u0300\u0323" * 500_000
  assert normalize_answer(f" {marks}\n") == marks
  assert normalize_answer("e\u0301" * 5_000) == "\u00e9" * 5_000
  for answers in ({marks: 1.0}, {"red": 1.0, marks: 0.3}):
    found = RecordReader([_record(answers=answers)], "x").read(0, lambda x: x)
    assert isinstance(found, BadRecord)
    assert "has 1,000,001 characters, the limit is 10,000" in found.reason


def test_normalize_keeps_distinguishing_characters() -> None:
  assert set(map(normalize_answer, CAFE)) == {"caf\u00e9"}
  for text in ("Red", "t-shirt", "10:30", "don't", "\ufb01ne", "a\u200db"):
    assert normalize_answer(text) == text
  equal = {"red": 0.3, "blue": 0.5, "red ": 1.0, " red": 0.6}
  assert normalized_answers(equal) == {"red": 1.0, "blue": 0.5}
  assert list(normalized_answers(equal)) == ["red", "blue"]


@pytest.mark.parametrize("given", RED_DOG)
def test_trained_answers_can_score(vocabulary: Vocabulary, given: str) -> None:
  """For every source, including shards with answers that are not normalised."""
  task = tasks.make_task("vqa", vocabulary)
  record = _record(answers={given: 1.0})
  encoded = task.encode(record)
  assert (
    encoded.label_ids == task.encode(_record(answers={"red dog": 1})).label_ids
  )
  assert list(tasks.vocabulary_texts("vqa", {}, [record]))[-1:] == [" red dog"]
  answer = task.decode(encoded.label_ids, (8, 8))
  assert answer == "red dog"
  for prediction in (answer, given):
    scores = VqaAccuracy().measure(record, str(prediction))
    assert scores == {"accuracy": 1.0}


def test_target_of_other_tasks(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("entailment", vocabulary)
  record = _record("entailment", answers={"yes ": 1.0})
  assert task.decode(task.encode(record).label_ids, (8, 8)) == "yes"
  assert EntailmentAccuracy().measure(record, "yes") == {"accuracy": 1.0}
  record = _record("caption", answers={CAFE[1]: 1.0})
  scores = CaptionMatch().measure(record, CAFE[0])
  assert scores is not None
  assert scores["exact_match"] == 1.0


def test_lists_of_answers(
  vocabulary: Vocabulary, tmp_path: pathlib.Path
) -> None:
  """Candidates, collected answers and targets agree."""
  path = tmp_path / "answers.json"
  path.write_text(json.dumps([RED_DOG[2], "cat"]))
  task = tasks.make_task("vqa", vocabulary, {"answers": str(path)})
  target = task.encode(_record(answers={RED_DOG[3]: 1.0})).label_ids[:-1]
  candidates = task.candidates()
  assert candidates is not None
  assert candidates[0] == target
  found = [_record(answers={text: 1.0}) for text in [*RED_DOG, *CAFE]]
  counts = answer_lists.collect_answers(found, "vqa")
  assert counts == {"red dog": len(RED_DOG), "caf\u00e9": len(CAFE)}


def _jsonl(folder: pathlib.Path, task: str, target: Any) -> Record:
  (folder / "1.jpg").write_bytes(tsv_files.picture(0))
  row = {"image": "1.jpg", "prompt": "what?", "target": target}
  path = folder / "own.jsonl"
  path.write_text(json.dumps(row) + "\n")
  return load_source("jsonl", task=task, split="train", path=str(path))[0]


@pytest.mark.parametrize("text", RED_DOG)
def test_files_are_read_in_one_spelling(
  tmp_path: pathlib.Path, text: str
) -> None:
  for target in (text, [text], {text: 1.0}):
    assert _jsonl(tmp_path, "vqa", target).answers == {"red dog": 1.0}
  assert _jsonl(tmp_path, "caption", text).answers == {"red dog": 1.0}
  if "\n" not in text and "\t" not in text:
    picture = base64.b64encode(tsv_files.picture(0)).decode()
    row = f"1\t1\twhat?\t0.3|!+{text}&&0.6|!+red dog\t\t{picture}\n"
    path = tmp_path / "vqa.tsv"
    path.write_text(row, encoding="utf-8", newline="")
    source = load_source("ofa_tsv", task="vqa", split="train", path=str(path))
    assert source[0].answers == {"red dog": 0.6}
  merged = _jsonl(tmp_path, "vqa", {text: 0.3, "red dog": 0.6}).answers
  assert merged == {"red dog": 0.6}


def _by_definition(counts: dict[str, int], needed: int) -> dict[str, float]:
  """The definition of VQA v2: mean over the sets of all annotators but one."""
  people = list(itertools.chain(*([a] * n for a, n in counts.items())))
  scores = {}
  for answer in counts:
    sets = [people[:i] + people[i + 1 :] for i in range(len(people))]
    matches = [min(rest.count(answer) / needed, 1) for rest in sets]
    scores[answer] = sum(matches) / len(matches)
  return scores


def test_ten_annotators() -> None:
  for count, score in enumerate((0.3, 0.6, 0.9, 1.0, 1.0), 1):
    others = [f"other {i}" for i in range(10 - count)]
    scores = annotator_scores([*others, *["yes"] * count])
    assert scores["yes"] == pytest.approx(score, abs=1e-12)
    expected = _by_definition({"yes": count, **dict.fromkeys(others, 1)}, 3)
    assert scores == pytest.approx(expected, abs=1e-12)
  assert annotator_scores(["yes"] * 10) == {"yes": 1.0}


@pytest.mark.parametrize(
  ("counts", "needed"),
  [
    ({"a": 2}, 1),
    ({"a": 2, "b": 1}, 2),
    ({"a": 3}, 2),
    ({"a": 3, "b": 1}, 3),
    ({"a": 2, "b": 2, "c": 1}, 3),
    ({"a": 7, "b": 5, "c": 3, "d": 1}, 3),
  ],
)
def test_other_numbers_of_annotators(
  counts: dict[str, int], needed: int
) -> None:
  people = list(itertools.chain(*([a] * n for a, n in counts.items())))
  scores = annotator_scores(people)
  assert scores == pytest.approx(_by_definition(counts, needed))
  assert all(0 < score <= 1 for score in scores.values())
  if len(counts) == 1:
    assert scores == {"a": 1.0}


def test_most_frequent_comes_first() -> None:
  """The first of several answers with the score 1 is the target."""
  assert list(annotator_scores(["no"] * 4 + ["yes"] * 5)) == ["yes", "no"]
  assert list(annotator_scores(["no", "yes"] * 5)) == ["no", "yes"]
  # Spellings are counted together; people without an answer count as people.
  scores = annotator_scores(["red ", "blue", "red", "", "blue ", "\tred", ""])
  assert list(scores) == ["red", "blue"]
  assert scores == pytest.approx(
    {
      k: v
      for k, v in _by_definition({"red": 3, "blue": 2, "": 2}, 3).items()
      if k
    }
  )
  assert annotator_scores(["one"]) == {"one": 1.0}
  assert annotator_scores([]) == {}


def test_a_list_with_repeats_is_of_annotators(
  vocabulary: Vocabulary, tmp_path: pathlib.Path
) -> None:
  people = ["blue", *["red"] * 6, "red ", "cat", "cat"]
  record = _jsonl(tmp_path, "vqa", people)
  assert record.annotators == 10
  assert record.answers == pytest.approx({"red": 1.0, "cat": 0.6, "blue": 0.3})
  task = tasks.make_task("vqa", vocabulary)
  encoded = task.encode(record)
  assert task.decode(encoded.label_ids, (8, 8)) == "red"
  assert encoded.confidence == 1.0
  assert VqaAccuracy().measure(record, "cat") == pytest.approx(
    {"accuracy": 0.6}
  )
  # Both have the score 1; the most frequent is the target.
  record = _jsonl(tmp_path, "vqa", ["cat"] * 4 + ["red"] * 6)
  assert task.decode(task.encode(record).label_ids, (8, 8)) == "red"
  # Stored and read back; a teacher's answer has no annotators.
  assert records.deserialize(records.serialize(record)) == record
  new = relabel(record, Label("cat", -0.5), task)
  assert new is not None
  assert new.annotators == 0


def test_a_list_without_repeats_has_right_answers(
  tmp_path: pathlib.Path,
) -> None:
  record = _jsonl(tmp_path, "vqa", ["two", "2", "a couple"])
  assert record.annotators == 0
  assert record.answers == dict.fromkeys(["two", "2", "a couple"], 1.0)
