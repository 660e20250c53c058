"""Updates whose numbers are not finite: what they change, what is written."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError
from narvl_jax.parallel import shard_batch
from narvl_jax.run.bad_numbers import _INFO_FILE, BundleWriter, load_bundle
from narvl_jax.state.parameters import ParameterRule
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.train_step import StepConfig, make_train_step
from tests.support import replacements, stand_in


@functools.cache
def _setup() -> Any:
  """A run with everything that an update could change."""
  return stand_in.setup(
    8,
    dropout=0.1,
    batch_norm=True,
    frozen="embed_tokens",
    optimizer__ema_decay=0.15,
    optimizer__schedule="linear",
    train__accumulation_steps=2,
  )


def _bad_batch(value: float) -> dict[str, np.ndarray]:
  batch = dict(stand_in.host_batch(1))
  batch["confidence"] = batch["confidence"].copy()
  batch["confidence"][5] = value
  return batch


def _count(state: TrainState) -> tuple[int, int]:
  """Returns the updates of Adam, and the steps of the schedule."""
  _, adam, _, schedule = state.opt_state
  return int(adam.count), int(schedule.count)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_update_changes_nothing_but_the_step(value):
  run = _setup()
  state, _ = run.train_step(stand_in.initial_state(run), stand_in.batch(run, 0))
  before = jax.device_get(state)
  state, metrics = run.train_step(
    state, shard_batch(_bad_batch(value), run.mesh)
  )
  after = jax.device_get(state)
  assert metrics["skipped"] == 1
  assert not np.isfinite(metrics["loss"])
  assert before.step == 1
  assert after.step == 2
  assert _count(before) == (1, 1)
  # The learning rate is that of the step, even after skipped updates.
  assert _count(after) == (1, 2)
  schedule = before.opt_state[-1]
  unchanged = dataclasses.replace(
    after, step=before.step, opt_state=(*after.opt_state[:-1], schedule)
  )
  pairs = zip(
    jax.tree.leaves_with_path(before), jax.tree.leaves(unchanged), strict=True
  )
  for (path, leaf), other in pairs:
    np.testing.assert_array_equal(leaf, other, err_msg=str(path))
  # The run can continue.
  state, metrics = run.train_step(state, stand_in.batch(run, 2))
  assert metrics["skipped"] == 0
  assert np.isfinite(metrics["loss"])
  assert float(metrics["learning_rate"]) == pytest.approx(0.01 * 48 / 50)
  assert _count(state) == (2, 3)


@pytest.mark.parametrize(
  ("key", "value"), [("labels", 10**6), ("labels", -1), ("label_length", 99)]
)
def test_a_wrong_target_does_not_pass_for_one(key, value):
  run = _setup()
  batch = dict(stand_in.host_batch(1))
  assert batch["valid"][5]
  assert batch["label_length"][5] > 0
  batch[key] = batch[key].copy()
  batch[key][5] = value
  state = stand_in.initial_state(run)
  _, metrics = run.train_step(state, shard_batch(batch, run.mesh))
  assert metrics["skipped"] == 1
  assert np.isnan(metrics["loss"])


def test_a_gradient_may_be_bad_while_the_loss_is_not():
  def objective(model, variables, batch, key, step):
    del model, key, step
    weight = variables["params"]["w"]
    # The root of zero is zero, and infinitely steep.
    loss = jnp.sum(jnp.sqrt(weight)) + 1.0
    nll = jnp.ones(batch["task"].shape)
    metrics = {"loss": loss, "nll_per_example": nll, "weight": 1.0}
    return loss, metrics, {}

  config = StepConfig(task_names=TASKS, objective=objective)
  optimizer = optax.sgd(1.0)
  model: Any = None
  step = make_train_step(
    model,
    optimizer,
    optax.constant_schedule(1.0),
    {"w": ParameterRule()},
    config,
  )
  batch: Any = {"task": jnp.zeros(2, jnp.int32), "valid": jnp.ones(2, bool)}
  for value, skipped in ((4.0, 0), (0.0, 1)):
    params = {"w": jnp.full(3, value)}
    state = TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats={},
      opt_state=optimizer.init(params),
      ema=None,
    )
    new, metrics = jax.jit(step)(state, batch, jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"]) == (not skipped)
    assert metrics["skipped"] == skipped
    expected = 0.0 if skipped else 4.0 - 0.25
    np.testing.assert_allclose(new.params["w"], expected)


def test_all_of_the_state_is_still_updated_in_place():
  run = _setup()
  memory: Any = run.compile_step().memory_analysis()
  assert memory.alias_size_in_bytes == run.state_bytes_per_device


def _write(folder: pathlib.Path, position: int = 6) -> pathlib.Path:
  run = _setup()
  writer = BundleWriter(
    folder,
    run.experiment.config,
    run.mesh,
    lambda position: [("vqa", 10 * position + i) for i in range(16)],
  )
  batch = shard_batch(_bad_batch(math.nan), run.mesh)
  metrics = {"loss": math.nan, "grad_norm": math.inf, "nll": 1.5}
  return writer.write(7, position, batch, metrics, 5)


def test_bundle_repeats_the_update(tmp_path):
  folder = _write(tmp_path)
  assert folder == tmp_path / "bad_numbers" / "step_0000007"
  assert sorted(path.name for path in folder.iterdir()) == [
    "host_000.npz",
    "update.json",
  ]
  # Any reader of JSON can read it.
  json.loads(
    (folder / "update.json").read_text(),
    parse_constant=lambda word: pytest.fail(word),
  )
  bundle = load_bundle(folder)
  assert bundle.info["examples"] == [["vqa", 60 + i] for i in range(16)]
  metrics = bundle.info["metrics"]
  assert math.isnan(metrics["loss"])
  assert metrics["grad_norm"] == math.inf
  assert metrics["nll"] == 1.5
  key = jax.random.fold_in(jax.random.key(0), 6)
  assert bundle.info["dropout_key"] == {
    "seed": 0,
    "folded_in": 6,
    "data": jax.random.key_data(key).tolist(),
  }
  for name in ("step", "data_position", "policy", "checkpoint"):
    assert (
      bundle.info[name]
      == {
        "step": 7,
        "data_position": 6,
        "policy": "stop",
        "checkpoint": 5,
      }[name]
    )
  run = _setup()
  state = stand_in.initial_state(run)
  _, again = run.train_step(state, shard_batch(bundle.batch, run.mesh))
  assert np.isnan(again["loss"])
  for name, values in _bad_batch(math.nan).items():
    np.testing.assert_array_equal(bundle.batch[name], values)
    assert bundle.batch[name].dtype == values.dtype


def test_bundles_of_one_step_and_several_batches(tmp_path):
  first, second = _write(tmp_path), _write(tmp_path, 9)
  assert second.name == "step_0000007_ahead_0000003"
  assert load_bundle(first).info["data_position"] == 6
  assert load_bundle(second).info["data_position"] == 9


def test_bundle_of_which_a_part_is_missing(tmp_path):
  folder = _write(tmp_path)
  with np.load(folder / "host_000.npz") as arrays:
    half: Any = {name: values[:8] for name, values in arrays.items()}
  np.savez(folder / "host_000.npz", **half)
  with pytest.raises(UserError, match=r"lacks the rows \[8, .* 15\]: the file"):
    load_bundle(folder)
  # The other half, as another host would have written it.
  other: Any = {name: x[8:] for name, x in _bad_batch(math.nan).items()}
  np.savez(folder / "host_001.npz", rows=np.arange(8, 16), **other)
  np.testing.assert_array_equal(
    load_bundle(folder).batch["text"], stand_in.host_batch(1)["text"]
  )


def test_no_bundle(tmp_path):
  _write(tmp_path)
  folder = tmp_path / "bad_numbers" / "step_0000008"
  with pytest.raises(
    UserError, match=r"step_0000008 is not an update .* mean \".*step_0000007\""
  ):
    load_bundle(folder)


def test_a_full_disk_does_not_hide_the_bad_number(tmp_path, monkeypatch):
  def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")

  warned = []
  monkeypatch.setattr(np, "savez", full)
  monkeypatch.setattr("narvl_jax.run.bad_numbers.warn", warned.append)
  folder = _write(tmp_path)
  assert warned == [
    f"{folder} cannot be written: [Errno 28] No space left on device"
  ]


@pytest.mark.parametrize("kind", ["pipe", "endless link", "deep JSON"])
def test_a_bundle_whose_info_is_no_file_is_not_waited_for(tmp_path, kind):
  replacements.replace(tmp_path / _INFO_FILE, kind)
  with pytest.raises(
    UserError, match="is not an update that a run has skipped"
  ):
    load_bundle(tmp_path)
