"""A run that goes on from a checkpoint ends where it would have ended."""

import json
import pathlib
import shutil
from typing import Any

import pytest

from narvl_jax.training.train_state import TrainState
from tests.training import small_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[pathlib.Path, TrainState]:
  """Returns a run of which every checkpoint is kept, and its last state."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, small_run.train(workdir)


def _metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines, without what depends on the clock."""
  text = (workdir / "metrics.jsonl").read_text()
  return [
    {
      name: value
      for name, value in json.loads(line).items()
      if "examples_per_second" not in name and name != "train/data_wait"
    }
    for line in text.splitlines()
  ]


def test_the_run_has_all_that_is_to_be_kept(whole):
  workdir, state = whole
  config = small_run.config()
  assert config.train.accumulation_steps > 1
  assert config.model.dropout > 0
  assert config.model.batch_norm == "batch"
  assert state.ema is not None
  lines = _metrics(workdir)
  # All three sources, in shares that change.
  shares = [
    [line[f"data/{name}/examples"] for name in config.data.train]
    for line in lines
  ]
  steps = [
    [b - a for a, b in zip(x, y, strict=True)]
    for x, y in zip([[0, 0, 0], *shares], shares, strict=False)
  ]
  assert all(min(counts) > 0 and sum(counts) == 8 for counts in steps)
  assert steps[0] != steps[-1]
  # And training does something.
  assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_the_loop_makes_the_updates_one_after_the_other(whole):
  _, state = whole
  states = small_run.by_hand(range(small_run.STEPS))
  small_run.assert_equal(state, states[-1])


@pytest.mark.parametrize("split", range(1, small_run.STEPS))
def test_every_split(whole, tmp_path, split):
  workdir, state = whole
  source = workdir / "checkpoints" / str(split)
  shutil.copytree(source, tmp_path / "checkpoints" / str(split))
  shutil.copy(workdir / "metrics.jsonl", tmp_path)
  # Only the last state is saved, which takes longest.
  resumed = small_run.train(tmp_path, train__checkpoint_every=0)
  small_run.assert_equal(resumed, state)
  assert _metrics(tmp_path) == _metrics(workdir)
