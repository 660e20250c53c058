"""A short run of the published recipe learns: minutes long."""

import json

import pytest

from configs import shapes
from configs.common import update
from narvl_jax.train import train


@pytest.mark.slow
def test_quick_recipe_leaves_blanks_and_guesses_behind(tmp_path):
  config = shapes.get_config("quick")
  update(
    config,
    {
      "train.steps": 150,
      "train.eval_every": 0,
      "train.checkpoint_every": 0,
      "evaluation.max_examples": 100,
      "mesh.data": 1,
    },
  )
  report = train(config, tmp_path / "run")
  assert report is not None
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  last = [json.loads(line) for line in lines][-1]
  # Captions by the words alone, without the picture, cost 0.98 per label at
  # the best; boxes ln 25 = 3.2 without any knowledge.
  assert last["train/nll/caption"] < 0.9
  assert last["train/nll/grounding"] < 2.9
  tasks = report["tasks"]
  # All blank would score 0.
  assert tasks["caption"]["token_f1"] > 0.5
  assert tasks["vqa"]["accuracy"] > 0.2
