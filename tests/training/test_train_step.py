"""One update of a stand-in model: what it changes and what it must not."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

from narvl_jax.data.example import TASKS
from narvl_jax.parallel import shard_batch
from narvl_jax.query_ctc import query_ctc_objective
from narvl_jax.state.parameters import flatten
from tests.support import stand_in


def _assert_close(a: object, b: object, **tolerance: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@functools.cache
def _reference_gradient() -> tuple[float, dict]:
  """Loss and gradient of the first batch, without any of the machinery."""
  run = stand_in.setup()
  state = stand_in.initial_state(run)
  batch: Any = stand_in.host_batch(0)

  def loss(params: dict) -> jax.Array:
    logits, _ = run.experiment.model.apply(
      {"params": params}, batch["image"], batch["text"]
    )
    return query_ctc_objective(
      logits,
      batch["labels"],
      batch["label_length"],
      blank_id=stand_in.VOCAB_SIZE - 1,
      confidence=batch["confidence"],
    )[0]

  value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
  return float(value), gradient


def test_first_update_against_optax():
  run = stand_in.setup()
  loss, gradient = _reference_gradient()
  states, metrics = stand_in.train(run, 1)
  norm = float(optax.tree.norm(gradient))
  assert metrics[0]["loss"] == pytest.approx(loss, rel=1e-6)
  assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(0.01, b1=0.9, b2=0.999, eps=1e-3, weight_decay=0.01),
  )
  params = states[0].params
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  expected = optax.apply_updates(params, updates)
  _assert_close(states[1].params, expected, rtol=1e-5, atol=1e-6)


def test_metrics_of_an_update():
  _, metrics = stand_in.train(stand_in.setup(), 1)
  batch = stand_in.host_batch(0)
  assert set(metrics[0]) == {
    *("loss", "nll", "infeasible_fraction", "examples", "grad_norm"),
    *("learning_rate", "skipped", *(f"nll/{task}" for task in TASKS)),
  }
  assert metrics[0]["skipped"] == 0
  assert metrics[0]["infeasible_fraction"] == 1 / stand_in.ROWS
  assert metrics[0]["learning_rate"] == pytest.approx(0.01)
  share = [np.mean(batch["task"] == i) for i in range(len(TASKS))]
  present = [i for i in range(len(TASKS)) if share[i]]
  assert [TASKS[i] for i in present] == ["vqa", "grounding"]
  for i, task in enumerate(TASKS):
    assert np.isnan(metrics[0][f"nll/{task}"]) == (i not in present)
  total = sum(share[i] * metrics[0][f"nll/{TASKS[i]}"] for i in present)
  assert total == pytest.approx(metrics[0]["nll"], rel=1e-6)


def test_step_counts_and_training_helps():
  states, metrics = stand_in.train(stand_in.setup(), 1)
  assert [int(state.step) for state in states] == [0, 1]
  run = stand_in.setup()
  state = stand_in.initial_state(run)
  losses = []
  for _ in range(30):
    state, values = run.train_step(state, stand_in.batch(run, 0))
    losses.append(float(values["loss"]))
  assert losses[0] == metrics[0]["loss"]
  assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("accumulation", "devices"), [(2, 1), (4, 4)])
def test_accumulation_is_the_update_of_the_whole_batch(accumulation, devices):
  whole, metrics = stand_in.train(stand_in.setup(), 3)
  run = stand_in.setup(devices, train__accumulation_steps=accumulation)
  parts, part_metrics = stand_in.train(run, 3)
  for a, b in zip(whole, parts, strict=True):
    _assert_close(a.params, b.params, rtol=0, atol=1e-6)
  for a, b in zip(metrics, part_metrics, strict=True):
    assert a == pytest.approx(b, rel=1e-5, nan_ok=True)


def test_micro_batches_count_by_their_rows():
  # All of the even rows, a micro-batch, and two of the odd ones.
  index = np.arange(stand_in.ROWS)
  rows = stand_in.host_batch(0) | {"valid": (index % 2 == 0) | (index < 4)}
  outcomes = []
  for settings in ({}, {"train__accumulation_steps": 2}):
    run = stand_in.setup(1, **settings)
    outcomes.append(
      run.train_step(stand_in.initial_state(run), shard_batch(rows, run.mesh))
    )
  (whole, metrics), (parts, part_metrics) = outcomes
  assert metrics["examples"] == 10
  _assert_close(whole.params, parts.params, rtol=0, atol=1e-6)
  _assert_close(metrics, part_metrics, rtol=1e-5)


# Runs with running statistics and averages of them.
AVERAGED = {"batch_norm": True, "optimizer__ema_decay": 0.15}


def test_eight_devices_do_what_one_does():
  one, metrics = stand_in.train(stand_in.setup(1, **AVERAGED), 4)
  run = stand_in.setup(8, **AVERAGED)
  eight, metrics_of_eight = stand_in.train(run, 4)
  # Among the state are the statistics, which are of the global batch.
  assert one[-1].batch_stats
  for a, b in zip(metrics, metrics_of_eight, strict=True):
    assert a == pytest.approx(b, rel=1e-6, nan_ok=True)
  # A bias before BatchNorm has no gradient but rounding, which Adam makes much
  # of: 0.97e-6 to 1.06e-6 by the order of equal sums.
  both: Any = (one[-1], eight[-1])
  for tree in both:
    for params in (tree.params, tree.ema["params"]):
      bias = params["image"]["bias"]
      assert np.all(np.abs(bias) < 2e-6)
      params["image"]["bias"] = np.zeros_like(bias)
  _assert_close(one[-1], eight[-1], rtol=1e-5, atol=1e-6)
  shards = stand_in.batch(run, 0)["image"].addressable_shards
  assert [shard.data.shape[0] for shard in shards] == [2] * 8


def test_moving_averages_with_warmup_take_in_statistics():
  states, _ = stand_in.train(stand_in.setup(1, **AVERAGED), 3)
  average = {"params": states[0].params, "batch_stats": states[0].batch_stats}
  # (1 + step) / (10 + step), at most 0.15: the third is limited.
  for decay, state in zip([1 / 10, 2 / 11, 3 / 12], states[1:], strict=True):
    decay = min(decay, 0.15)
    average = jax.tree.map(
      lambda old, new, d=decay: d * old + (1 - d) * new,
      average,
      {"params": state.params, "batch_stats": state.batch_stats},
    )
    _assert_close(state.ema, average, rtol=1e-5, atol=1e-7)
  assert np.any(states[1].batch_stats["BatchNorm_0"]["mean"] != 0)


def test_old_state_is_donated():
  run = stand_in.setup(8, **AVERAGED)
  state = stand_in.initial_state(run)
  new, _ = run.train_step(state, stand_in.batch(run, 0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


FROZEN = {
  "frozen": "embed_tokens",
  "optimizer__ema_decay": 0.75,
  "optimizer__ema_warmup": False,
}


def test_moving_averages_without_warmup():
  states, _ = stand_in.train(stand_in.setup(**FROZEN), 3)
  average = states[0].params
  for state in states[1:]:
    average = jax.tree.map(
      lambda old, new: 0.75 * old + 0.25 * new, average, state.params
    )
    assert state.ema is not None
    trained = {name: average[name] for name in ("image", "head")}
    _assert_close(state.ema["params"], trained, rtol=1e-5, atol=1e-7)


def test_frozen_parameters_cost_nothing_and_stay():
  run = stand_in.setup(**FROZEN)
  states, metrics = stand_in.train(run, 3)
  before, after = flatten(states[0].params), flatten(states[-1].params)
  assert before.keys() == after.keys()
  for path in before:
    same = np.array_equal(before[path], after[path])
    assert same == (path == "embed_tokens"), path
  assert run.num_frozen == before["embed_tokens"].size == 16 * 8
  assert states[-1].ema is not None
  assert "embed_tokens" not in states[-1].ema["params"]
  # Two moments of every other parameter, and the counters.
  sizes = sum(x.size for x in jax.tree.leaves(states[-1].opt_state) if x.ndim)
  assert sizes == 2 * (run.num_parameters - run.num_frozen)
  _, gradient = _reference_gradient()
  trained = {name: gradient[name] for name in ("image", "head")}
  norm = float(optax.tree.norm(trained))
  assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_dropout_depends_on_the_step_only():
  run = stand_in.setup(1, dropout=0.5)

  def loss(step: int) -> float:
    state = stand_in.initial_state(run)
    where = state.step.sharding
    state = dataclasses.replace(
      state, step=jax.device_put(np.int32(step), where)
    )
    return float(run.train_step(state, stand_in.batch(run, 0))[1]["loss"])

  assert loss(0) == loss(0)
  assert loss(0) != loss(1)


def test_rows_that_only_fill_a_batch_do_not_count():
  run = stand_in.setup()
  valid = np.arange(stand_in.ROWS) % 3 != 0
  outcomes = []
  for other in (1, 2):
    # The same valid rows, and different ones beside them.
    rows = {
      name: np.where(
        valid.reshape(-1, *(1,) * (x.ndim - 1)),
        x,
        stand_in.host_batch(other)[name],
      )
      for name, x in stand_in.host_batch(0).items()
    }
    rows["valid"] = valid
    state, metrics = run.train_step(
      stand_in.initial_state(run), shard_batch(rows, run.mesh)
    )
    outcomes.append(jax.device_get((state.params, metrics)))
  (params, metrics), (others, other_metrics) = outcomes
  assert metrics["examples"] == valid.sum() < stand_in.ROWS
  _assert_close(metrics, other_metrics, rtol=1e-6)
  _assert_close(params, others, rtol=1e-5, atol=1e-7)
