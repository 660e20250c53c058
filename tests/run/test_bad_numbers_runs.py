"""A batch that gives NaN at step 7, and what the three policies make of it."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from narvl_jax.data.batches import readers
from narvl_jax.errors import UserError
from narvl_jax.parallel import shard_batch
from narvl_jax.run.bad_numbers import load_bundle
from tests.programs import nan_reader
from tests.support import small_run

BAD_STEP = 7
# Of the bad record in its batch.
ROW = 3


@pytest.fixture(autouse=True)
def _one_bad_record(monkeypatch):
  mixture = small_run.mixture()
  draw = mixture[BAD_STEP - 1][ROW]
  # The batches without it are made before.
  small_run.host_batches(small_run.STEPS + 4)
  read = nan_reader.spoiled(draw.entry, draw.position)
  monkeypatch.setattr(readers.TrainReader, "__call__", read)


def _train(workdir: pathlib.Path, policy: str, **settings: Any) -> Any:
  settings = {"train__checkpoint_every": 5, **settings}
  return small_run.train(workdir, bad_numbers__policy=policy, **settings)


def _lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _assert_on_disk(workdir: pathlib.Path, expected: dict[int, Any]) -> None:
  found = small_run.states_on_disk(workdir)
  assert sorted(found) == sorted(expected)
  for step, state in found.items():
    small_run.assert_equal(state, expected[step])


def test_stop(tmp_path):
  with pytest.raises(
    UserError,
    match=r"the loss is nan at step 7; .*--config.bad_numbers.policy=skip, or"
    rf" rollback; .* {tmp_path}/bad_numbers/step_0000007$",
  ):
    _train(tmp_path, "stop", train__checkpoint_every=2)
  states = small_run.by_hand(range(6))
  _assert_on_disk(tmp_path, {step: states[step] for step in (2, 4, 6)})
  assert _lines(tmp_path)[-1]["train/loss"] is None

  # What was written of it gives NaN again, on the state before it.
  bundle = load_bundle(tmp_path / "bad_numbers" / "step_0000007")
  assert bundle.info["checkpoint"] == 6
  batch = small_run.host_batches(small_run.STEPS + 4)[BAD_STEP - 1]
  assert [index for _, index in bundle.info["examples"]] == list(batch["index"])
  assert np.isnan(bundle.batch["confidence"]).nonzero()[0].tolist() == [ROW]
  run = small_run.setup()
  state = jax.device_put(states[6], run.shardings)
  _, metrics = small_run.compiled()(
    run.read_inputs(), state, shard_batch(bundle.batch, run.mesh)
  )
  assert np.isnan(metrics["loss"])
  assert metrics["nll/grounding"] == bundle.info["metrics"]["nll/grounding"]


def test_skip_is_a_run_with_a_void_update(tmp_path):
  _train(tmp_path, "skip")
  states = small_run.by_hand([0, 1, 2, 3, 4, 5, None, 7, 8, 9])
  _assert_on_disk(tmp_path, {step: states[step] for step in (5, 10)})
  assert [x["train/skipped_updates"] for x in _lines(tmp_path)] == (
    [0] * 6 + [1] * 4
  )


def test_rollback_is_a_run_without_the_batches(tmp_path, capsys):
  _train(tmp_path, "rollback")
  states = small_run.by_hand([0, 1, 2, 3, 4, 7, 8, 9, 10, 11])
  _assert_on_disk(tmp_path, {step: states[step] for step in (5, 10)})
  assert (
    "rolled back from step 7 to 5, rollback 1 of at most 10; continuing with"
    " batch 7" in (capsys.readouterr().out)
  )
  lines = _lines(tmp_path)
  assert [line["step"] for line in lines] == list(range(1, 11))
  assert [x["train/rollbacks"] for x in lines] == [0] * 5 + [1] * 5


def test_stopped_run_resumes_by_another_policy(tmp_path):
  with pytest.raises(UserError, match="at step 7"):
    _train(tmp_path, "stop", train__checkpoint_every=3)
  state = _train(tmp_path, "rollback", train__checkpoint_every=9)
  # And once more, from a checkpoint that is ahead in the data.
  positions = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
  states = small_run.by_hand(positions)
  small_run.assert_equal(state, states[-1])
  last = tmp_path / "checkpoints" / "10"
  last.rename(tmp_path / "10")
  again = _train(tmp_path, "stop", train__checkpoint_every=0)
  small_run.assert_equal(again, states[-1])
