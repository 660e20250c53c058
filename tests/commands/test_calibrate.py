"""`python -m narvl_jax.calibrate`, and what `predict` does with its file."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from narvl_jax.calibrate import calibrate
from narvl_jax.errors import UserError
from narvl_jax.evaluate import Options as EvaluateOptions
from narvl_jax.evaluate import evaluate
from narvl_jax.evaluation import outcomes
from narvl_jax.metrics.calibration import apply_temperature
from narvl_jax.predict import Options as PredictOptions
from narvl_jax.predict import predict
from narvl_jax.prediction.calibration import Calibration, read_temperatures
from narvl_jax.prediction.request import Request
from tests.evaluation import tiny_run

TASKS = {"caption", "vqa", "grounding", "entailment"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tiny_run.copy_run(tmp_path_factory.mktemp("calibrate") / "run")
  calibrate(folder, max_examples=24, batch_size=8)
  return folder


def _with_temperatures(workdir: pathlib.Path, temperature: float) -> None:
  tasks = {task: {"temperature": temperature} for task in TASKS}
  Calibration(tiny_run.STEP, "greedy", "validation", tasks).write(workdir)


def test_files_of_the_command(workdir):
  content = json.loads((workdir / "calibration.json").read_text())
  assert content["step"] == tiny_run.STEP
  assert (content["decoding"], content["split"]) == ("greedy", "validation")
  assert set(content["tasks"]) == TASKS
  for found in content["tasks"].values():
    assert found["examples"] == 24
    assert 0.05 <= found["temperature"] <= 20
    assert 0 <= found["ece_after"] <= 1
    assert 0 <= found["ece_before"] <= 1
    assert set(found["thresholds"]) == {"0.9", "0.95", "0.99"}
  picture = Image.open(workdir / "calibration.png")
  # One or two diagrams for each of four tasks.
  temperatures = {x["temperature"] for x in content["tasks"].values()}
  assert picture.size == (328 if temperatures == {1} else 656, 1312)
  assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 3


def test_predict_and_evaluate_apply_the_temperatures(tmp_path):
  workdir = tiny_run.copy_run(tmp_path / "run")
  request = {"task": "vqa", "example": 3}
  before = predict(workdir, Request(**request))
  assert "raw_probability" not in before
  _with_temperatures(workdir, 3.0)
  after = predict(workdir, Request(**request))
  assert after["raw_probability"] == before["probability"]
  assert after["probability"] == pytest.approx(
    float(apply_temperature(before["probability"], 3.0))
  )
  assert after["warnings"] == before["warnings"]
  assert "raw:         " in outcomes.format_outcome(after)
  box = predict(workdir, Request(task="grounding", example=3))
  assert box["probability"] == pytest.approx(
    float(apply_temperature(box["probability_iou50"], 3.0))
  )
  evaluate(workdir, EvaluateOptions(max_examples=4, tasks=["vqa", "grounding"]))
  (path,) = (workdir / "predictions").glob("*.jsonl")
  for line in path.read_text().splitlines():
    found = json.loads(line)
    base = found.get("probability_iou50", found["raw_probability"])
    assert ("probability_iou50" in found) == (found["task"] == "grounding")
    assert found["probability"] == pytest.approx(
      float(apply_temperature(base, 3.0))
    )


def test_an_answer_below_the_threshold_is_withheld(tmp_path):
  workdir = tiny_run.copy_run(tmp_path / "run")
  request = {"task": "vqa", "example": 3}
  given = predict(
    workdir, Request(**request), PredictOptions(min_probability=0.0)
  )
  assert not given["abstained"]
  assert isinstance(given["answer"], str)
  outcome = predict(
    workdir, Request(**request), PredictOptions(min_probability=1.0)
  )
  assert outcome["abstained"]
  assert outcome["answer"] is None
  text = outcomes.format_outcome(outcome)
  assert "vqa:         withheld: right with probability " in text
  assert "%, below --min_probability=1\n" in text
  # Neither does a picture show it.
  box = predict(
    workdir,
    Request(task="grounding", example=3),
    PredictOptions(min_probability=1.0),
  )
  assert "overlay" not in box
  assert not list((workdir / "predictions").glob("overlay*"))
  with pytest.raises(
    UserError, match=r"=1\.5 is not in \[0, 1\]; nearest valid:.*=1"
  ):
    predict(workdir, Request(**request), PredictOptions(min_probability=1.5))


@pytest.mark.parametrize(
  ("step", "decoding"),
  [(tiny_run.STEP + 1, "greedy"), (tiny_run.STEP, "beam")],
)
def test_a_file_of_another_checkpoint_or_decoding(workdir, step, decoding):
  temperatures, note = read_temperatures(workdir, step, decoding)
  assert temperatures == {}
  assert f"for step {tiny_run.STEP} and decoding greedy, not for step" in note
  assert "run python -m narvl_jax.calibrate --workdir=" in note


@pytest.mark.parametrize(
  "text", ["", "[]", "{}", '{"step": 7, "decoding": "", "split": ""}']
)
def test_a_damaged_file_is_set_aside(tmp_path, text):
  (tmp_path / "calibration.json").write_text(text)
  assert read_temperatures(tmp_path, 7, "greedy") == ({}, "")
  assert not (tmp_path / "calibration.json").exists()
  assert len(list(tmp_path.iterdir())) == 1


def test_command_ends_in_one_line(tmp_path):
  result = subprocess.run(
    [sys.executable, "-m", "narvl_jax.calibrate", f"--workdir={tmp_path}/no"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1
  assert "has no run" in result.stderr
