"""Panels and files made from predictions."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from narvl_jax.errors import UserError
from narvl_jax.evaluation import evaluator, reporting, results
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.experiment.experiment import Experiment
from tests.evaluation import tiny_run
from tests.support import disks, replacements
from tests.terminal.test_text import NASTY


@pytest.fixture(scope="module")
def evaluated() -> tuple[reporting.Report, list[reporting.Prediction]]:
  experiment, variables = tiny_run.tiny_model()
  return evaluator.evaluate_tasks(
    experiment, variables, split="test", max_examples=12, batch_size=16, step=7
  )


def test_panels_show_the_pictures_of_their_predictions(evaluated):
  experiment, _ = tiny_run.tiny_model()
  _, predictions = evaluated
  panels = results.prediction_panels(experiment, "test", predictions, 3)
  chosen = reporting.select_examples(predictions, 3)
  assert len(panels) == 12
  for panel, prediction in zip(panels, chosen, strict=True):
    source = load_dataset(experiment.config, prediction["dataset"], "test")
    record = source[prediction["index"]]
    np.testing.assert_array_equal(panel.image, record.image)
    assert panel.prompt == record.prompt
    number = prediction["index"]
    assert panel.title == f"{record.task} / {record.kind} #{number}"
    shows_iou = f", IoU {prediction['scores'].get('mean_iou', 0):.2f}"
    assert panel.prediction.endswith(shows_iou) == (record.box is not None)
    assert panel.target_box == record.box


def test_files_contain_the_report_and_every_prediction(evaluated, tmp_path):
  experiment, _ = tiny_run.tiny_model()
  report, predictions = evaluated
  paths = results.write_results(experiment, tmp_path, report, predictions)
  assert [str(path.relative_to(tmp_path)) for path in paths] == [
    "evaluations/test-7-greedy-max12.json",
    "predictions/test-7-greedy-max12.jsonl",
    "predictions/test-7-greedy-max12.png",
    "predictions/test-7-greedy-max12-mistakes.png",
  ]
  assert json.loads(paths[0].read_text()) == report
  lines = paths[1].read_text().splitlines()
  assert [json.loads(line) for line in lines] == predictions
  with Image.open(paths[2]) as grid:
    assert grid.width > 5 * 256
    assert grid.height > 8 * 256


def test_mistakes_are_sorted_by_the_loss_of_the_truth(
  evaluated, tmp_path, monkeypatch
):
  experiment, _ = tiny_run.tiny_model()
  report, predictions = evaluated
  wrong = results.mistakes(predictions)
  assert len(wrong) == sum(x["correct"] is False for x in predictions) > 12
  losses = [x["loss"] for x in wrong]
  assert losses == sorted(losses, reverse=True)
  assert len(set(losses)) > 12
  drawn = []
  grid = results.rendering.prediction_grid
  monkeypatch.setattr(
    results.rendering,
    "prediction_grid",
    lambda panels, **texts: (
      drawn.append((panels, texts)) or grid(panels, **texts)
    ),
  )
  results.write_results(experiment, tmp_path, report, predictions)
  (_, (panels, texts)) = drawn
  assert texts["title"].startswith(f"{len(wrong)} mistakes of ")
  assert texts["title"].endswith("the largest loss first")
  chosen = reporting.select_examples(wrong, 10)
  assert [x.title.rpartition("#")[2] for x in panels] == [
    str(x["index"]) for x in chosen
  ]
  for panel, prediction in zip(panels, chosen, strict=True):
    assert f", loss {prediction['loss']:.3g}" in panel.target
  # The largest loss of a kind is the first of its kind.
  for task in {x["task"] for x in wrong}:
    most = next(x for x in wrong if x["task"] == task)
    first = next(x for x in chosen if x["task"] == task)
    assert first["probability"] == most["probability"]


def test_any_text_of_a_record_can_be_written(evaluated, tmp_path):
  experiment, _ = tiny_run.tiny_model()
  settings, predictions = evaluated
  fields = ("id", "kind", "prompt")
  changed = [
    {**x, **{field: NASTY for field in fields}, "answers": {NASTY: 1.0}}
    for x in predictions
  ]
  for prediction in changed:
    if prediction["task"] == "grounding":
      prediction["target"] = [-1e300, 0.0, 1e300, 1e308]
    else:
      prediction["target"] = NASTY
  kinds = {
    task: {NASTY: next(iter(found.values()))}
    for task, found in settings["kinds"].items()
  }
  report = {**settings, "kinds": kinds}
  paths = results.write_results(experiment, tmp_path, report, changed)
  assert json.loads(paths[0].read_text()) == report
  lines = paths[1].read_text().splitlines()
  assert [json.loads(line) for line in lines] == changed
  with Image.open(paths[2]) as grid:
    assert grid.width > 5 * 256
  assert reporting.file_name({**report, "split": NASTY}).isascii()
  table = reporting.format_table(report)
  assert "\\x1b]0;owned" in table
  assert "\x1b" not in table


def test_a_missing_picture_only_omits_its_panel(
  evaluated, tmp_path, monkeypatch, caplog
):
  experiment, _ = tiny_run.tiny_model()
  report, predictions = evaluated
  whole = results.prediction_panels(experiment, "test", predictions)
  monkeypatch.setattr(
    Experiment,
    "dataset",
    lambda self, *name: _Gone(load_dataset(self.config, *name), 2),
  )
  with caplog.at_level(logging.WARNING, logger="absl"):
    panels = results.prediction_panels(experiment, "test", predictions)
  assert 0 < len(panels) < len(whole)
  assert "left out of the pictures: record" in caplog.text
  monkeypatch.setattr(
    Experiment,
    "dataset",
    lambda self, *name: _Gone(load_dataset(self.config, *name), 0),
  )
  paths = results.write_results(experiment, tmp_path, report, predictions)
  assert [path.suffix for path in paths] == [".json", ".jsonl"]
  assert json.loads(paths[0].read_text()) == report


class _Gone:
  """Records of which only every `kept`-th can still be read."""

  def __init__(self, source, kept):
    self.source, self.kept = source, kept

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index):
    if not self.kept or index % self.kept:
      raise OSError("gone")
    return self.source[index]


def test_folder_that_cannot_be_written(evaluated, tmp_path):
  experiment, _ = tiny_run.tiny_model()
  with disks.small_disk(tmp_path / "run", 1000) as run:
    disks.read_only(run)
    with pytest.raises(
      UserError, match=r'cannot write ".*predictions/test-7.*": Read-only'
    ):
      results.write_results(experiment, run, *evaluated)
    assert not list(run.iterdir())


def test_a_removed_run_folder_is_not_created_again(evaluated, tmp_path):
  experiment, _ = tiny_run.tiny_model()
  with pytest.raises(UserError, match=r'cannot write ".*": No such file'):
    results.write_results(experiment, tmp_path / "run", *evaluated)
  assert not list(tmp_path.iterdir())


def test_only_the_evaluation_of_the_config_is_the_main_one(
  tmp_path, monkeypatch
):
  """Limits, tasks, decodings, splits and steps have files of their own."""
  monkeypatch.setattr(
    results.rendering,
    "prediction_grid",
    lambda panels, title, note: Image.new("RGB", (8, 8)),
  )
  experiment, _ = tiny_run.tiny_model()
  main = {
    "split": "test",
    "step": 7,
    "decoding_name": "greedy",
    "max_examples": None,
    "only_tasks": None,
    "examples": 0,
    "tasks": {},
    "counts": {},
    "kinds": {},
    "datasets": {},
  }
  found = {}
  for name, change in (
    ("test-7-greedy", {}),
    ("test-5-greedy", {"step": 5}),
    ("held_out-7-greedy", {"split": "held_out"}),
    ("test-7-beam-num_best3", {"decoding_name": "beam-num_best3"}),
    ("test-7-greedy-max9", {"max_examples": 9}),
    ("test-7-greedy-vqa-caption", {"only_tasks": ["vqa", "caption"]}),
    ("a%2F..%2Fb-7-greedy", {"split": "a/../b"}),
  ):
    report = main | change
    best = name != "test-5-greedy"
    paths = results.write_results(experiment, tmp_path, report, [], best=best)
    found[name] = report
    assert [path.stem for path in paths[:3]] == [name] * 3
    assert len(paths) == (4 if change == {} else 3)
  for change in ({"cider_df": "coco.json"}, {"annotations": "vqa.json"}):
    report = main | change
    paths = results.write_results(experiment, tmp_path, report, [], best=True)
    assert len(paths) == 3
    found[f"test-7-greedy-{next(iter(change))}"] = report
  written = json.loads((tmp_path / "evaluation.json").read_text())
  assert written == found["test-7-greedy"]
  assert {
    path.stem: json.loads(path.read_text())
    for path in (tmp_path / "evaluations").iterdir()
  } == found
  names = {path.name for path in (tmp_path / "predictions").iterdir()}
  assert names == {f"{name}.{x}" for name in found for x in ("jsonl", "png")}


def test_an_answer_without_a_box_is_reported_as_such():
  prediction = {
    "task": "grounding",
    "kind": "",
    "prompt": "star",
    "prediction": [0.0, 0.0, 0.0, 0.0],
    "target": [1.0, 2.0, 5.0, 6.0],
    "probability": 0.5,
    "correct": False,
  }
  image = np.zeros((8, 8, 3), np.uint8)
  panel = results.make_panel(prediction, image)
  assert panel.prediction == "no box (50 %)"
  assert panel.predicted_box is None
  assert panel.target_box == (1.0, 2.0, 5.0, 6.0)
  found = results.make_panel({**prediction, "prediction": [1, 2, 5, 6]}, image)
  assert found.predicted_box == (1, 2, 5, 6)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_page_of_mistakes_names_the_command_to_repeat_them(
  split, evaluated, tmp_path, monkeypatch
):
  pages = []

  def spy(panels, title, note):
    pages.append((panels, title, note))
    return Image.new("RGB", (8, 8))

  monkeypatch.setattr(results.rendering, "prediction_grid", spy)
  experiment, _ = tiny_run.tiny_model()
  report, predictions = evaluated
  predictions = [x | {"correct": x["index"] > 0} for x in predictions]
  report = report | {"split": split}
  paths = results.write_results(experiment, tmp_path, report, predictions)
  name = f"{split}-7-greedy-max12"
  assert [x.name for x in paths[2:]] == [f"{name}.png", f"{name}-mistakes.png"]
  (whole, title, note), (wrong, title_of_wrong, note_of_wrong) = pages
  assert len(whole) == 40
  assert [panel.correct for panel in wrong] == [False] * 4
  assert title.startswith(f"{tmp_path.name}, {split}, step 7, greedy, 48 exa")
  assert title_of_wrong == f"4 mistakes of {title}, the largest loss first"
  assert note_of_wrong == note
  expected = f"#N: python -m narvl_jax.predict --workdir={tmp_path}"
  expected += " --task=TASK --example=N"
  assert note == expected + (" --split=validation" if split != "test" else "")


def test_panels_of_another_data_set_of_a_task_name_it():
  prediction = {
    "task": "vqa",
    "kind": "",
    "prompt": "how many?",
    "prediction": "2",
    "target": None,
    "probability": 0.5,
    "correct": None,
    "scores": None,
    "index": 3,
  }
  image = np.zeros((8, 8, 3), np.uint8)
  panel = results.make_panel(prediction, image, place="--dataset=other ")
  assert panel.title == "vqa --dataset=other #3"
  assert panel.prediction == "2 (50 %)"


@pytest.mark.parametrize("kind", replacements.NO_FILES)
def test_files_in_the_place_of_results_are_set_aside(tmp_path, kind, caplog):
  names = ("evaluation.json", "evaluations", "predictions")
  for name in names:
    replacements.replace(tmp_path / name, kind)
  results.make_way(tmp_path)
  moved = names[:1] if kind == "folder" else names
  assert caplog.messages == [
    f"{tmp_path / name} cannot be used: it is not a"
    f" {'file' if '.' in name else 'folder'}; set aside as {name}.damaged"
    for name in moved
  ]
  for name in moved:
    assert not (tmp_path / name).is_symlink()
    assert not (tmp_path / name).exists()
  results.make_way(tmp_path)
  assert len(caplog.messages) == len(moved)


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "folder"])
def test_results_are_written_in_spite_of_it(evaluated, tmp_path, kind):
  experiment, _ = tiny_run.tiny_model()
  report, predictions = evaluated
  name = reporting.file_name(report)
  for path in (
    tmp_path / "evaluations" / f"{name}.json",
    tmp_path / "predictions" / f"{name}.png",
    tmp_path / "predictions" / f"{name}-mistakes.png",
  ):
    path.parent.mkdir(exist_ok=True)
    replacements.replace(path, kind)
  for path in results.write_results(experiment, tmp_path, report, predictions):
    assert path.is_file()
    assert not path.is_symlink()
