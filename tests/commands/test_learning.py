"""A short run of the published recipe learns: minutes long."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

_SETTINGS = {
  "train.steps": 150,
  "train.eval_every": 0,
  "train.checkpoint_every": 0,
  "evaluation.max_examples": 100,
}


@pytest.mark.slow
def test_quick_recipe_leaves_blanks_and_guesses_behind(tmp_path):
  run = tmp_path / "run"
  subprocess.run(
    [
      *(sys.executable, "-m", "narvl_jax.train"),
      *("--config=configs/shapes.py:quick", f"--workdir={run}"),
      *(f"--config.{name}={value}" for name, value in _SETTINGS.items()),
    ],
    cwd=ROOT,
    # As users have it: not with the flags of the tests, by which what takes
    # long to run takes longer.
    env=os.environ | {"XLA_FLAGS": ""},
    check=True,
  )
  lines = (run / "metrics.jsonl").read_text().splitlines()
  last = [json.loads(line) for line in lines][-1]
  # Captions by the words alone, without the picture, cost 0.98 per label at
  # the best; boxes ln 25 = 3.2 without any knowledge.
  assert last["train/nll/caption"] < 0.9
  assert last["train/nll/grounding"] < 2.9
  tasks = json.loads((run / "evaluation.json").read_text())["tasks"]
  # All blank would score 0.
  assert tasks["caption"]["token_f1"] > 0.5
  assert tasks["vqa"]["accuracy"] > 0.2
