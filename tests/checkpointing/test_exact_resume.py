"""A resumed run equals one that was never interrupted."""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import pytest

from narvl_jax.state.train_state import TrainState
from tests.support import small_run


class Whole(NamedTuple):
  """A run that keeps every checkpoint, and its last state."""

  real: bool
  workdir: pathlib.Path
  state: TrainState


@pytest.fixture(
  scope="module",
  params=[
    pytest.param(False, id="stand-in"),
    pytest.param(True, id="real", marks=pytest.mark.slow),
  ],
)
def whole(request, tmp_path_factory) -> Whole:
  workdir = tmp_path_factory.mktemp("whole")
  real = request.param
  return Whole(real, workdir, small_run.train(workdir, real=real))


def _metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines without values that depend on the clock."""
  text = (workdir / "metrics.jsonl").read_text()
  return [
    {
      name: value
      for name, value in json.loads(line).items()
      if not small_run.depends_on_clock(name)
    }
    for line in text.splitlines()
  ]


def test_the_run_has_all_that_is_to_be_kept(whole):
  config = small_run.config()
  assert config.train.accumulation_steps > 1
  assert config.model.dropout > 0
  assert config.model.batch_norm == "batch"
  assert whole.state.ema is not None
  assert jax.tree.leaves(whole.state.batch_stats)
  lines = _metrics(whole.workdir)
  # All three sources occur, in varying proportions.
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
  # Training changes the loss.
  assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_the_loop_makes_the_updates_one_after_the_other(whole):
  states = small_run.by_hand(range(small_run.STEPS), whole.real)
  small_run.assert_equal(whole.state, states[-1])


def _only(whole: Whole, split: int, folder: pathlib.Path) -> None:
  """Copies a run as if it had ended at a step."""
  source = whole.workdir / "checkpoints" / str(split)
  shutil.copytree(source, folder / "checkpoints" / str(split))
  shutil.copy(whole.workdir / "metrics.jsonl", folder)


@pytest.mark.parametrize("split", range(1, small_run.STEPS))
def test_every_split(whole, tmp_path, split):
  _only(whole, split, tmp_path)
  # Saving takes longest, so only the last state is saved.
  resumed = small_run.train(
    tmp_path, real=whole.real, train__checkpoint_every=0
  )
  small_run.assert_equal(resumed, whole.state)
  assert _metrics(tmp_path) == _metrics(whole.workdir)


def test_another_mesh(whole, tmp_path):
  _only(whole, 4, tmp_path)
  small_run.train(
    tmp_path, real=whole.real, devices=4, train__checkpoint_every=0
  )
  losses = [
    [line["train/loss"] for line in _metrics(folder)]
    for folder in (whole.workdir, tmp_path)
  ]
  assert len(losses[1]) == small_run.STEPS
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)
