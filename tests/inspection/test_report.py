"""`python -m narvl_jax.report`: one page about a run, complete or not."""

import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.errors import UserError
from narvl_jax.evaluation import reporting
from narvl_jax.inspection.charts import line_chart
from narvl_jax.inspection.run_page import run_page
from narvl_jax.report import report
from narvl_jax.run_folder import restarts, times, workdir
from tests.evaluation import tiny_run
from tests.inspection import pages
from tests.support.replacements import NO_FILES

_REPORT: dict[str, Any] = {
  "split": "test",
  "step": 7,
  "decoding_name": "greedy",
  "max_examples": None,
  "only_tasks": None,
  "examples": 20,
  "tasks": {
    "vqa": {"accuracy": 0.7125},
    "caption": {"cider": 1.3951},
    "entailment": {"accuracy": 0.5},
  },
  "counts": {"vqa": 8, "caption": 8, "entailment": 4},
  "kinds": {"vqa": {pages.HOSTILE: {"accuracy": 0.25, "examples": 3}}},
  "datasets": {},
  "intervals": {"vqa": {"accuracy": [0.701, 0.724]}},
  "unavailable": {"caption": {"spice": "Java is missing " + pages.HOSTILE}},
  "confusion": {
    "entailment": {"classes": ["yes", "no"], "counts": [[311, 2, 0], [1, 7, 4]]}
  },
  "pope": {
    "vqa": {
      "popular": {
        **{"examples": 9, "accuracy": 0.875, "precision": None, "recall": 0.5},
        **{"f1": 0.25, "yes_ratio": 0.125, "intervals": {"f1": [0.125, 0.5]}},
      }
    }
  },
}
_FILES = (
  *("metrics.jsonl", "evaluation.json", "calibration.json", "time.jsonl"),
  *("restarts.jsonl", "environment.json", "config.json"),
)


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
  """A run folder with everything that the page shows, and hostile texts."""
  folder = tmp_path / "run"
  folder.mkdir()
  config = tiny_run.tiny_config().copy_and_resolve_references()
  config.train.batch_size = 64
  config.init_from = pages.HOSTILE
  workdir.write_config(folder, config)
  lines = [
    {
      "step": step,
      "train/loss": None if step == 30 else 85 / step,
      "train/nll/vqa": 0.1,
      "train/examples_per_second": 32.0 if step == 20 else 640.0,
      "train/data_wait": 0.25,
      f"validation/vqa/{pages.HOSTILE}": 0.1 * step,
      "test/vqa/accuracy": 0.5,
    }
    for step in (10, 20, 30)
  ]
  text = "".join(json.dumps(x) + "\n" for x in lines)
  (folder / "metrics.jsonl").write_text(text + "damaged\n")
  (folder / "evaluation.json").write_text(json.dumps(_REPORT))
  (folder / "evaluations").mkdir()
  other = _REPORT | {"decoding_name": "beam"}
  name = reporting.file_name(other)
  (folder / "evaluations" / f"{name}.json").write_text(json.dumps(other))
  (folder / "evaluations" / "odd.json").write_text("[]")
  (folder / "predictions").mkdir()
  name = reporting.file_name(_REPORT)
  Image.new("RGB", (5, 4)).save(folder / "predictions" / f"{name}.png")
  calibration = {"vqa": {"temperature": 1.2345, "split": pages.HOSTILE}}
  (folder / "calibration.json").write_text(json.dumps(calibration))
  counts = {"from_step": 0, "step": 15, "updates": 15}
  seconds = {"init": 30.0, "step": 90.0}
  moment = "2026-01-01T00:02:00+00:00"
  times.record(folder, {**counts, "seconds": seconds}, moment)
  counts = {"from_step": 10, "step": 20, "updates": 10}
  moment = "2026-01-01T00:05:00+00:00"
  times.record(folder, {**counts, "seconds": {"step": 80.0}}, moment)
  restarts.record_end(
    folder, pages.HOSTILE, code=1, stage="step", step=17, since=None
  )
  restarts.record_restart(folder, step=10, saved=None)
  environment = {"started": "2026-01-01", "command": [pages.HOSTILE], "step": 0}
  (folder / "environment.json").write_text(json.dumps(environment))
  return folder


def test_a_page_has_everything_and_escapes_it(run, capsys):
  assert report(run) == run / "report.html"
  assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
  page = (run / "report.html").read_text(encoding="utf-8")
  text, images = pages.read(page)
  assert "<script>" not in page
  # In the kinds, a reason, a metric, a split, a command, an end, a setting.
  assert text.count("<script>alert(1)</script>") >= 7
  assert len(images) == 1
  for value in (
    "3 lines of metrics.jsonl, until step 30",
    "steps from which the run was resumed",
    "Loss (logarithmic)",
    "test, step 7, greedy, 20 examples",
    "71.2 % [70.1, 72.4]",
    "25.0 %",
    "139.5",
    "spice: unavailable (Java is missing",
    "yes 311 2 0",
    "popular 9 87.5 % 50.0 % 25.0 % [12.5, 50.0] 12.5 %",
    "test-7-beam",
    "missing: there is no predictions/test-7-greedy-mistakes.png",
    "vqa / temperature 1.234",
    "in 2 processes",
    "step 2m50s 85.0 %",
    "goodput 46.7 % of 5m00s; lost: between processes 33.3 %, lost work 10.0 %",
    "lost work 30s 10.0 %",
    "until step 20 2 s 25.0 %",
    "median 0.1 s",
    "restarts 1,",
    "train.batch_size 128 64",
    "2026-01-01",
  ):
    assert value in text, value


def test_a_run_that_has_only_begun(tmp_path):
  workdir.write_config(tmp_path, tiny_run.tiny_config())
  target = tmp_path / "new" / "page.html"
  assert report(tmp_path, target) == target
  text, images = pages.read(target.read_text(encoding="utf-8"))
  assert images == []
  for name in ("metrics.jsonl", "evaluation.json", "calibration.json"):
    assert f"missing: there is no {name};" in text
  for name in ("time.jsonl", "environment.json"):
    assert f"missing: there is no {name};" in text
  assert "Restarts none" in text


@pytest.mark.parametrize("content", [b"\xff\x00", b"[]", b'{"step": 1}', b""])
@pytest.mark.parametrize("name", _FILES)
def test_damaged_files_cost_their_part_only(run, name, content):
  (run / name).write_bytes(content)
  text, _ = pages.read(run_page(run))
  assert ("71.2 %" in text) == (name != "evaluation.json")
  assert "in 2 processes" in text or name == "time.jsonl"


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_missing_file_only_omits_its_part(run, kind):
  for name in ("evaluation.json", "metrics.jsonl", "environment.json"):
    (run / name).unlink()
    NO_FILES[kind](run / name)
  text, _ = pages.read(run_page(run))
  assert "missing: there is no metrics.jsonl" in text
  assert "in 2 processes" in text


def test_reports_of_any_shape(run):
  for damage in (
    {"tasks": 3},
    {"counts": {}},
    {"intervals": {"vqa": {"accuracy": ["a"]}}},
    {"confusion": {"vqa": {"classes": [], "counts": [[1]]}}},
    {"split": None},
  ):
    (run / "evaluation.json").write_text(json.dumps(_REPORT | damage))
    text, _ = pages.read(run_page(run))
    assert "in 2 processes" in text


def test_a_folder_without_a_run(tmp_path):
  with pytest.raises(UserError, match=r'" has no run: there is no config'):
    report(tmp_path)
  result = subprocess.run(
    [sys.executable, "-m", "narvl_jax.report"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2
  assert result.stderr == ("error: the run folder is missing; see --help\n")


@pytest.mark.parametrize(
  "values",
  [[1.0], [2.0, 2.0], [0.0, 0.0], [-3.0, 1e9], [1e-9, 5.0], [1e300, -1e300]],
)
def test_charts_of_any_values(values):
  points = [(float(x), y) for x, y in enumerate(values)]
  drawn = line_chart("title", {"a": points, "empty": []}, [0.5])
  text, _ = pages.read(
    f"<html><style>(prefers-color-scheme: dark)</style>{drawn}</html>"
  )
  assert "title" in text
  assert "empty" not in text
  # A line of one point would be invisible.
  assert ("<circle" in str(drawn)) == (len(values) == 1)
  shown = drawn.partition('points="')[2].partition('"')[0].replace(",", " ")
  places = np.array(shown.split(), float)
  assert np.isfinite(places).all()
  assert (places >= 0).all()
  assert (places <= 400).all()
  assert math.isfinite(places.sum())
