"""Intervals of every figure of a report, and bad records in its figures."""

import dataclasses

from narvl_jax.evaluation import evaluator, reporting
from narvl_jax.evaluation.metric import Options
from tests.evaluation import test_evaluator
from tests.evaluation.test_evaluator import (
  _identity,
  _known_records,
  _oracle,
  _record,
  _tally,
)

serve = test_evaluator.serve


def test_bad_records_count_as_wrong(serve):
  records = [
    _record("vqa", "red", i, answers={"red": 1.0}, kind="color")
    for i in range(4)
  ]
  records[3] = dataclasses.replace(records[3], image=b"no picture")
  captions = [_record("caption", "red", i, answers={}) for i in range(3)]
  captions[2] = dataclasses.replace(captions[2], image=b"no picture")
  serve(records + captions + _known_records()[7:])
  report, _ = evaluator.evaluate_tasks(
    _oracle(max_bad_fraction=0.4),
    _identity(),
    split="test",
    batch_size=4,
    options=Options(intervals=True),
  )
  assert report["tasks"]["vqa"] == {"accuracy": 0.75}
  assert report["kinds"]["vqa"]["color"]["accuracy"] == 1
  low, high = report["intervals"]["vqa"]["accuracy"]
  assert low < 0.75 <= high
  # Its other records have no ground truth.
  assert report["tasks"]["caption"] == {}
  entry = report["datasets"]["vqa"]
  assert (entry["accuracy"], entry["examples"], entry["records"]) == (
    0.75,
    3,
    4,
  )
  text = reporting.format_table(report)
  assert "2 bad records count as wrong" in text
  assert "3 / 4" in text


def test_bad_records_of_data_without_labels_do_not_count():
  tally = _tally(range(4))
  for position in (2, 3):
    tally.predictions[position]["dataset"] = "unlabelled"
    for metric in tally.metrics["vqa"]:
      metric.measured[position] = None
  before = _tally(range(2)).report(split="test", step=1)
  tally.bad = {4: ("vqa", "unlabelled")}
  report = tally.report(split="test", step=1)
  assert report["tasks"]["vqa"] == before["tasks"]["vqa"]
  entry = report["datasets"]["unlabelled"]
  assert "accuracy" not in entry
  assert (entry["examples"], entry["records"]) == (2, 3)


def test_every_figure_has_an_interval(serve):
  records = _known_records()
  for i, kind in enumerate(("random", "popular")):
    question = {"kind": kind, "question_type": "is there"}
    records.append(
      _record("vqa", "yes", 9 + i, answers={"yes": 1.0}, **question)
    )
  serve(records)
  report, _ = evaluator.evaluate_tasks(
    _oracle(),
    _identity(),
    split="test",
    batch_size=4,
    options=Options(intervals=True),
  )
  entries = [
    entry
    for key in ("kinds", "question_types", "sizes")
    for groups in report[key].values()
    for entry in groups.values()
  ]
  entries += report["datasets"].values()
  entries += report["pope"]["vqa"].values()
  entries += report["confusion"]["entailment"]["per_class"].values()
  entries += [
    {**x, "intervals": report["intervals"][task]}
    for task, x in report["tasks"].items()
  ]
  assert len(entries) > 14
  others = ("examples", "records", "task", "intervals")
  checked = 0
  for entry in entries:
    for name in entry.keys() - set(others):
      if entry[name] is not None:
        low, high = entry["intervals"][name]
        assert low - 1e-9 <= entry[name] <= high + 1e-9
        checked += 1
  assert checked > 40
  text = reporting.format_table(report)
  (row,) = [x for x in text.splitlines() if x.startswith("  color")]
  assert " ± " in row
  (row,) = [x for x in text.splitlines() if x.startswith("random")]
  assert row.count(" ± ") == len(reporting.POPE_FIGURES)
