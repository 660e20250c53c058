"""Annotations and submissions in the layout of the official files."""

import base64
import json
import pathlib
from typing import Any

import pytest

from narvl_jax.evaluate import Options, evaluate
from narvl_jax.submission import submission
from tests.data.sources import tsv_files
from tests.evaluation import tiny_run

_INFO = {
  "info": {"description": "This is v2.0.", "version": "2.0", "year": 2017},
  "license": {"name": "CC BY 4.0", "url": "http://example.org"},
  "data_subtype": "val2014",
  "data_type": "mscoco",
}
_OKVQA = {**_INFO, "task_type": "Open-Ended"}
_NAME = f"test-{tiny_run.STEP}-greedy"


def _run(tmp_path: pathlib.Path, task: str, **entry: Any) -> pathlib.Path:
  """Returns a run whose data set of a task is another one."""
  run = tiny_run.copy_run(tmp_path / "run")
  path = run / "config.json"
  config = json.loads(path.read_text())
  config["evaluation"] |= entry.pop("evaluation", {})
  config["data"]["evaluation"] = {task: {"task": task, **entry}}
  path.write_text(json.dumps(config))
  return run


def _list(tmp_path: pathlib.Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Writes a list of records with pictures; returns their entry."""
  for number, row in enumerate(rows):
    row["image"] = f"{number}.jpg"
    (tmp_path / row["image"]).write_bytes(tsv_files.picture(number))
  path = tmp_path / "own_test.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return {"source": "jsonl", "options": {"path": str(path)}}


def _said(run: pathlib.Path, name: str) -> list[Any]:
  lines = (run / "predictions" / f"{name}.jsonl").read_text().splitlines()
  return [json.loads(line)["prediction"] for line in lines]


def _submission(run: pathlib.Path, form: str) -> Any:
  path = run / "submission.json"
  submission(run / "predictions" / f"{_NAME}.jsonl", form=form, to=path)
  return json.loads(path.read_text())


def _vqa(number: int, answer: str) -> dict[str, Any]:
  return {
    "question_type": "what is" if number else "is the",
    "multiple_choice_answer": answer,
    "answers": [
      {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
      for i in range(10)
    ],
    "image_id": 262148,
    "answer_type": "other",
    "question_id": 262148000 + number,
  }


def _okvqa(number: int, answer: str) -> dict[str, Any]:
  entry = _vqa(number, answer)
  del entry["multiple_choice_answer"]
  for given in entry["answers"]:
    given["raw_answer"] = given["answer"] + "s"
  return {**entry, "question_type": "four", "confidence": 3}


def _aokvqa(number: int, answer: str) -> dict[str, Any]:
  return {
    "split": "val",
    "image_id": 461751,
    "question_id": f"22jbM6gDxdaMaunuzgrsB{number}",
    "question": "What is in the motorcyclist's mouth?",
    "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
    "correct_choice_idx": 3,
    "direct_answers": [answer] * 10,
    "difficult_direct_answer": number == 2,
    "rationales": ["He's smoking."] * 3,
  }


@pytest.mark.parametrize(
  ("form", "rule", "annotate", "whole"),
  [
    ("vqa", "vqa_v2", _vqa, lambda x: {**_INFO, "annotations": x}),
    ("vqa", "ok_vqa", _okvqa, lambda x: {**_OKVQA, "annotations": x}),
    ("aokvqa", "a_okvqa", _aokvqa, lambda x: x),
  ],
)
def test_questions(tmp_path, form, rule, annotate, whole):
  ids = [annotate(i, "")["question_id"] for i in range(3)]
  rows = [{"id": i, "prompt": "what color is it?"} for i in ids]
  run = _run(
    tmp_path, "vqa", **_list(tmp_path, rows), evaluation={"vqa_rule": rule}
  )
  blind = evaluate(run)
  assert blind["tasks"]["vqa"] == {}
  said = _said(run, _NAME)
  # The first is right, the second is wrong; A-OKVQA leaves the third out.
  truth = [said[0], "neither", "neither"]
  entries = [annotate(i, x) for i, x in enumerate(truth)]
  path = tmp_path / "annotations.json"
  path.write_text(json.dumps(whole(entries)))
  report = evaluate(run, Options(annotations=str(path)))
  share = 1 / 2 if form == "aokvqa" else 1 / 3
  assert report["tasks"]["vqa"]["vqa_accuracy"] == pytest.approx(share)
  assert report["tasks"]["vqa"].keys() == report["intervals"]["vqa"].keys()
  types = {k: x["examples"] for k, x in report["question_types"]["vqa"].items()}
  assert (
    types
    == {
      "vqa_v2": {"is the": 1, "what is": 2},
      "ok_vqa": {"four": 3},
      "a_okvqa": {},
    }[rule]
  )
  found = _submission(run, form)
  if form == "vqa":
    assert found == [
      {"question_id": i, "answer": x} for i, x in zip(ids, said, strict=True)
    ]
  else:
    assert found == {
      i: {"multiple_choice": "", "direct_answer": x}
      for i, x in zip(ids, said, strict=True)
    }


def test_captions(tmp_path):
  rows = [{"id": str(i)} for i in (179765, 190236)]
  run = _run(tmp_path, "caption", **_list(tmp_path, rows))
  evaluate(run)
  said = _said(run, _NAME)
  annotations = [
    {"image_id": 179765, "id": 38, "caption": "A black Honda motorcycle."},
    {"image_id": 190236, "id": 41, "caption": f"{said[1]}."},
    {"image_id": 179765, "id": 182, "caption": "A Honda in a garage"},
  ]
  images = [
    {
      **{"license": 3, "file_name": f"COCO_val2014_{x['id']:0>12}.jpg"},
      **{"height": 480, "width": 640, "id": int(x["id"])},
    }
    for x in rows
  ]
  path = tmp_path / "captions_val2014.json"
  whole = {"info": _INFO["info"], "images": images, "licenses": []}
  path.write_text(json.dumps({**whole, "annotations": annotations}))
  report = evaluate(run, Options(annotations=str(path)))
  assert report["tasks"]["caption"]["exact_match"] == 0.5
  assert _submission(run, "coco") == [
    {"image_id": int(row["id"]), "caption": x}
    for row, x in zip(rows, said, strict=True)
  ]


def test_boxes(tmp_path):
  """Rows as in OFA's files of RefCOCO: id, picture, text, box, picture."""
  picture = base64.b64encode(tsv_files.picture(1)).decode()
  rows = [
    ("79_1", "COCO_train2014_000000581857", "woman", "1.0,2.0,20.5,30.0"),
    ("79_2", "COCO_train2014_000000581857", "the lady", "0.0,0.0,9.0,9.5"),
  ]
  path = tmp_path / "refcoco_val.tsv"
  path.write_text("".join("\t".join((*row, picture)) + "\n" for row in rows))
  run = _run(
    tmp_path, "grounding", source="ofa_tsv", options={"path": str(path)}
  )
  report = evaluate(run)
  assert {*report["tasks"]["grounding"]} == {"acc@0.5", "acc@0.75", "mean_iou"}
  boxes = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in _said(run, _NAME)]
  assert _submission(run, "refcoco") == [
    {"sent_id": row[0], "box": pytest.approx(box)}
    for row, box in zip(rows, boxes, strict=True)
  ]
