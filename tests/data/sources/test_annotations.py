"""Official annotations are joined to records by their ids."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from narvl_jax.data.example import Record
from narvl_jax.data.shards import records
from narvl_jax.data.sources.annotations import (
  AnnotatedSource,
  load_annotations,
)
from narvl_jax.data.sources.fields import listed_answers
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import evaluation_source
from narvl_jax.experiment.datasets import load_dataset
from tests.evaluation import tiny_run

PEOPLE = ["Yes.", *["yes"] * 8, "no"]
VQA = {
  "annotations": [
    {
      "question_id": 458752000,
      "image_id": 458752,
      "question_type": "is this",
      "answer_type": "yes/no",
      "answers": [
        {"answer": text, "answer_confidence": "yes", "answer_id": i}
        for i, text in enumerate(PEOPLE)
      ],
    }
  ]
}


def _write(path: pathlib.Path, content: Any) -> pathlib.Path:
  path.write_text(json.dumps(content))
  return path


def _record(name: str, task: str = "vqa", **fields: Any) -> Record:
  return Record(name, task, np.zeros((4, 4, 3), np.uint8), **fields)


def _annotated(
  path: pathlib.Path, rows: list[Record], task: str = "vqa"
) -> AnnotatedSource:
  return AnnotatedSource(rows, path, task=task, split="val", name="quiz")


def test_questions_get_people_and_types(tmp_path):
  path = _write(tmp_path / "vqa.json", VQA)
  rows = [
    _record("458752000", answers={"yes": 0.6}, kind="old"),
    _record("458752000"),
    _record("7", answers={"no": 1.0}),
  ]
  first, unscored, other = _annotated(path, rows)
  assert first.people == tuple(PEOPLE)
  assert (first.kind, first.question_type) == ("yes/no", "is this")
  assert first.answers == {"yes": 0.6}
  assert unscored.answers == {"yes": 1.0, "Yes.": 0.3, "no": 0.3}
  assert other == rows[2]


def test_difficult_questions_of_a_okvqa_have_no_people(tmp_path):
  content = [
    {"question_id": "a", "direct_answers": ["dog"] * 10},
    {
      "question_id": "b",
      "direct_answers": ["cat"] * 10,
      "difficult_direct_answer": True,
    },
  ]
  path = _write(tmp_path / "a.json", content)
  rows = [_record(name, answers={"x": 1.0}, kind="old") for name in "ab"]
  plain, difficult = _annotated(path, rows)
  assert plain.people == ("dog",) * 10
  assert plain.kind == "old"
  assert difficult.people == ()


def test_captions_get_the_references_of_their_picture(tmp_path):
  content = {
    "annotations": [
      {"image_id": 9, "id": 1, "caption": "A dog. "},
      {"image_id": 9, "id": 2, "caption": "the dog"},
      {"image_id": 9, "id": 3, "caption": "the dog"},
    ]
  }
  path = _write(tmp_path / "captions.json", content)
  row = _record("9", "caption", answers={"old": 1.0})
  (record,) = _annotated(path, [row], "caption")
  assert record.answers == {"A dog.": 1.0, "the dog": 1.0}
  assert [x.strip() for x in record.people] == ["A dog.", "the dog", "the dog"]


def test_ids_without_annotation_are_rejected_before_any_prediction(tmp_path):
  path = _write(tmp_path / "vqa.json", VQA)
  rows = [_record(name) for name in ("458752000", "8", "9")]
  source = _annotated(path, rows)
  source.check([0])
  message = (
    r'quiz: 2 of 2 records have no annotation in ".*vqa\.json", the first has'
    r' the id "8"; the file has 1, such as "458752000"\. .* split "val" by'
    r" --config\.data\.evaluation\.quiz\.annotations="
  )
  with pytest.raises(UserError, match=message):
    source.check([0, 1, 2])


@pytest.mark.parametrize(
  ("content", "task", "message"),
  [
    (
      {"questions": []},
      "vqa",
      r'not a file of annotations of VQA v2 .*"annotati',
    ),
    ([{"question_id": 1}], "vqa", r"KeyError: 'direct_answers'"),
    ({"annotations": [{"question_id": 1, "answers": [1]}]}, "vqa", "TypeError"),
    ({"annotations": [{}]}, "caption", "not a file of COCO captions"),
    ({}, "grounding", r'set of grounding; only vqa .*annotations=""'),
  ],
)
def test_other_files(tmp_path, content, task, message):
  path = _write(tmp_path / "x.json", content)
  with pytest.raises(UserError, match=message):
    load_annotations(path, task)


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match=r"nowhere\.json"):
    load_annotations(tmp_path / "nowhere.json", "vqa")


def test_the_file_of_a_config_may_depend_on_the_split(tmp_path):
  config = tiny_run.tiny_config().copy_and_resolve_references()
  _write(tmp_path / "test.json", VQA)
  config.data.evaluation.vqa = evaluation_source(
    "shapes", "vqa", annotations=f"{tmp_path}/{{split}}.json", image_size=32
  )
  source = load_dataset(config, "vqa", "test")
  assert isinstance(source, AnnotatedSource)
  assert source[0].people == ()
  with pytest.raises(UserError, match=r"validation\.json"):
    load_dataset(config, "vqa", "validation")


def test_lists_of_annotators_keep_their_raw_answers_in_shards():
  found = listed_answers(PEOPLE)
  assert found["people"] == tuple(PEOPLE)
  assert "people" not in listed_answers(["two", "2"])
  picture = records.encoded_image(np.zeros((4, 4, 3), np.uint8))
  record = Record("a", "vqa", picture, "?", question_type="is", **found)
  assert records.deserialize(records.serialize(record)) == record
  old = Record("a", "vqa", picture)
  assert b"people" not in records.serialize(old)
  assert records.deserialize(records.serialize(old)).people == ()
