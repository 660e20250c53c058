"""The table and the JSON of `narvl_jax.status`."""

import json
import subprocess
import sys

import pytest

from narvl_jax import status
from narvl_jax.run_folder.overview import Overview

_RUN = Overview(
  "runs/a",
  "alive",
  alive=True,
  host="pod-0, 7",
  phase="step",
  step=60,
  steps=100,
  loss=2.5,
  updates_per_second=2.0,
  seconds_left=20.0,
  goodput=0.4567,
  checkpoint={"step": 40, "age": 33.0},
  evaluation={
    "step": 20,
    "metrics": {
      **{"validation/vqa/accuracy": 0.25, "validation/vqa/other": 1.0},
      **{"b/c/d": 1.0, "e/f/g": 2.0, "h/i/j": 3.0},
    },
  },
  restarts=2,
  errors={"host_001": "error: no \x1b[31m text"},
)


def test_table(golden):
  text = status.format_status([_RUN, Overview("runs/b", "no run")])
  golden("terminal/status.txt", text + "\n")


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("az://box/run", "az:// cannot be read"),
    ("--watch=-1", "--watch=-1 must be seconds, such as --watch=30"),
  ],
)
def test_mistakes(tmp_path, argument, message):
  result = _run(str(tmp_path), argument)
  assert result.returncode == 2
  assert message in result.stderr
  assert result.stderr.count("\n") == 1


def test_json(tmp_path):
  result = _run(str(tmp_path), str(tmp_path / "b"), "--json")
  assert result.returncode == 0, result.stderr
  assert [x["state"] for x in json.loads(result.stdout)["runs"]] == [
    *("no run", "no run")
  ]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "narvl_jax.status", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
