"""The table, the files and the choice of examples."""

import json
import os

import pytest

from narvl_jax.evaluation import reporting
from narvl_jax.files.disk import write_json

REPORT = {
  "split": "test",
  "step": 7,
  "examples": 13,
  "tasks": {
    "vqa": {"accuracy": 0.5},
    "grounding": {"acc@0.5": 0.25, "mean_iou": 0.125},
    "caption": {},
  },
  "counts": {"vqa": 4, "grounding": 8, "caption": 1},
  "kinds": {
    "vqa": {
      "colour": {"accuracy": 1.0, "examples": 1},
      "count": {"accuracy": 1 / 3, "examples": 3},
    }
  },
}


def test_table_has_a_line_per_task_and_kind():
  assert reporting.format_table(REPORT).splitlines() == [
    "test, step 7, greedy, 13 examples",
    "",
    "task       examples  accuracy  acc@0.5  mean_iou",
    "-" * 48,
    "vqa               4    50.0 %",
    "  colour          1   100.0 %",
    "  count           3    33.3 %",
    "grounding         8             25.0 %    12.5 %",
    "caption           1  (no ground truth)",
  ]


def test_intervals_sizes_cider_and_unavailable_figures_are_shown():
  report = {
    **REPORT,
    "tasks": {
      "caption": {"cider": 1.395, "bleu_4": 0.25},
      "grounding": {"acc@0.5": 0.5},
    },
    "kinds": {},
    "sizes": {"grounding": {"small": {"acc@0.5": 0.25, "examples": 4}}},
    "intervals": {"caption": {"cider": [1.3, 1.5]}},
    "unavailable": {
      "caption": {"meteor": "no Java", "spice": "no Java", "rouge": "no " * 40}
    },
  }
  assert reporting.format_metrics(report).splitlines() == [
    "task       examples         cider  bleu_4  acc@0.5",
    "-" * 50,
    "caption           1  139.5 ± 10.0  25.0 %",
    "grounding         8                         50.0 %",
    "  small           4                         25.0 %",
    "caption: meteor, spice unavailable: no Java",
    "caption: rouge unavailable:" + 24 * " no",
    "  no" + 15 * " no",
  ]


def test_small_tables_follow_the_large_one():
  figures = dict.fromkeys(("accuracy", "precision", "recall", "f1"), 0.5)
  report = {
    **REPORT,
    "confusion": {
      "entailment": {
        "classes": ["yes", "no"],
        "counts": [[3, 1, 0], [0, 2, 5]],
        "per_class": {
          "yes": {"precision": 1.0, "recall": 0.75, "f1": 0.5},
          "no": {"precision": None, "recall": 0.25, "f1": 0.5},
        },
      }
    },
    "pope": {"vqa": {"random": figures | {"yes_ratio": None, "examples": 9}}},
  }
  assert reporting.format_table(report).splitlines()[9:] == [
    "",
    "entailment: truth  yes  no  other  precision  recall      f1",
    "-" * 60,
    "yes                  3   1      0    100.0 %  75.0 %  50.0 %",
    "no                   0   2      5          -  25.0 %  50.0 %",
    "",
    "vqa: POPE  examples  accuracy  precision  recall      f1  yes_ratio",
    "-" * 67,
    "random            9    50.0 %     50.0 %  50.0 %  50.0 %          -",
  ]


def test_notes_follow_the_row_of_their_task():
  notes = {"vqa": "not trained yet", "caption": "not trained yet"}
  rows = reporting.format_metrics(REPORT, notes, kinds=False).splitlines()
  assert rows[2:] == [
    "vqa               4    50.0 %  (not trained yet)",
    "grounding         8             25.0 %    12.5 %",
    "caption           1  (no ground truth)",
  ]


@pytest.mark.parametrize(
  ("change", "heading"),
  [
    ({"decoding_name": "beam"}, "test, step 7, beam, 13 examples"),
    ({"step": None}, "test, no step, greedy, 13 examples"),
    (
      {"max_examples": 5},
      "test, step 7, greedy, 13 examples, at most 5 of each data set",
    ),
    (
      {"max_examples": 5, "only_tasks": ["vqa", "caption"]},
      "test, step 7, greedy, 13 examples, at most 5 of each data set, only vqa"
      " and caption",
    ),
  ],
)
def test_the_heading_names_what_was_evaluated(change, heading):
  table = reporting.format_table(REPORT | change)
  assert table.splitlines()[0] == heading


def test_json_replaces_the_old_file_at_once(tmp_path, monkeypatch):
  path = tmp_path / "evaluation.json"
  write_json(path, {"step": 1})
  seen = []
  replace = os.replace

  def watched(source, target):
    seen.append(json.loads(path.read_text()))
    replace(source, target)

  monkeypatch.setattr(os, "replace", watched)
  write_json(path, {"step": 2})
  assert seen == [{"step": 1}]
  assert json.loads(path.read_text()) == {"step": 2}
  assert os.listdir(tmp_path) == ["evaluation.json"]


def test_failure_leaves_the_old_file_and_no_rubbish(tmp_path):
  path = tmp_path / "predictions.jsonl"
  reporting.write_predictions(path, [{"id": "a"}])

  with pytest.raises(ValueError, match="JSON"):
    reporting.write_predictions(path, [{"id": "b"}, {"p": float("nan")}])
  assert path.read_text() == '{"id": "a"}\n'
  assert os.listdir(tmp_path) == ["predictions.jsonl"]


def test_predictions_are_one_object_a_line(tmp_path):
  path = tmp_path / "new" / "test.jsonl"
  predictions = [{"id": "a", "prompt": "two\nlines, ünïcode"}, {"id": "b"}]
  reporting.write_predictions(path, predictions)
  lines = path.read_text(encoding="utf-8").splitlines()
  assert [json.loads(line) for line in lines] == predictions
  assert "ünïcode" in lines[0]


@pytest.mark.parametrize(
  ("answer", "text"),
  [
    ("red", "red"),
    ("", "(empty)"),
    (None, "unknown"),
    ([1.2, 3.0, 10.6, 20.0], "1, 3, 11, 20"),
  ],
)
def test_answers_for_people(answer, text):
  assert reporting.format_answer(answer) == text


def test_examples_cover_every_task_and_kind():
  kinds = ["common"] * 20 + ["rare"] * 2
  predictions = [
    {"id": f"{task}{i}", "task": task, "kind": kind}
    for task in ("vqa", "caption")
    for i, kind in enumerate(kinds)
  ]
  chosen = reporting.select_examples(predictions, 5)
  assert [x["id"] for x in chosen] == [
    *("vqa0", "vqa20", "vqa1", "vqa21", "vqa2"),
    *("caption0", "caption20", "caption1", "caption21", "caption2"),
  ]
