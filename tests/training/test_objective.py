"""The loss of autoregressive models: prompts, constraints, accumulation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from narvl_jax.data.example import TASKS
from narvl_jax.decoding.constraint import answer_trie
from narvl_jax.state.parameters import ParameterRule
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.objective import AutoregressiveLoss
from narvl_jax.training.train_step import StepConfig, make_train_step
from tests.support.stand_in_decoders import (
  EOS,
  KEY,
  PAD,
  PROMPTED,
  VQA,
  B,
  Decoder,
  V,
  batch,
  decoder_variables,
  log_probs_by_hand,
)


def autoregressive_loss(**settings: Any) -> AutoregressiveLoss:
  return AutoregressiveLoss(
    vocab_size=V, pad_id=PAD, eos_id=EOS, prompted=PROMPTED, **settings
  )


def evaluate(
  loss: AutoregressiveLoss, rows: dict[str, jax.Array]
) -> dict[str, np.ndarray]:
  """Returns the metrics, with the gradient's norm."""

  def objective(variables: Any) -> tuple[jax.Array, Any]:
    value, metrics, _ = loss(Decoder(), variables, rows, KEY, jnp.zeros(()))
    return value, metrics

  gradient, metrics = jax.jit(jax.grad(objective, has_aux=True))(
    decoder_variables()
  )
  return {**metrics, "norm": np.asarray(optax.tree.norm(gradient))}


def test_prompts_are_the_prefix_of_some_tasks() -> None:
  metrics = evaluate(autoregressive_loss(), batch())
  rows = jax.device_get(batch())
  total, count = 0.0, 0
  for row in np.flatnonzero(rows["valid"]):
    length = rows["label_length"][row]
    log_probs = log_probs_by_hand(row)
    nll = -log_probs[np.arange(length), rows["labels"][row][:length]]
    total += rows["confidence"][row] * nll.sum()
    count += length
    mean = rows["confidence"][row] * nll.mean()
    assert metrics["nll_per_example"][row] == pytest.approx(mean, rel=1e-5)
  assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-5)
  assert float(metrics["weight"]) == count
  assert float(metrics["examples"]) == B - 1


def test_constraints_restrict_and_renormalise() -> None:
  rows = jax.device_get(batch())
  # The answers that vqa rows have, and one that shares a beginning with one.
  answers = [
    rows["labels"][row][: rows["label_length"][row] - 1].tolist()
    for row in range(B)
    if rows["task"][row] == VQA
  ]
  answers = [answer for answer in answers if answer]
  answers += [[answers[0][0], 4], [11], [EOS]]
  # Rows whose only label is eos have an answer that no list can hold.
  empty = (rows["label_length"] == 1) & (rows["task"] == VQA)
  assert empty.any()
  trie = {VQA: answer_trie(answers)}
  metrics = evaluate(autoregressive_loss(constraints=trie), batch())
  for row in np.flatnonzero(rows["valid"]):
    labels = rows["labels"][row][: rows["label_length"][row]].tolist()
    log_probs = log_probs_by_hand(row)
    expected = []
    for place, label in enumerate(labels):
      following = {
        answer[place] if place < len(answer) else EOS
        for answer in answers
        if answer[:place] == labels[:place]
      }
      classes = sorted(following) if rows["task"][row] == VQA else range(V)
      log_probs_here = log_probs[place, list(classes)]
      mass = np.log(np.exp(log_probs_here).sum())
      expected.append(mass - log_probs[place, label])
    mean = rows["confidence"][row] * np.mean(expected)
    assert metrics["nll_per_example"][row] == pytest.approx(
      mean, rel=1e-4, abs=1e-6
    )


def test_labels_outside_of_the_constraint_do_not_count() -> None:
  answer = np.asarray(batch()["labels"])[3, :2].tolist()
  loss = autoregressive_loss(constraints={VQA: answer_trie([answer])})
  metrics = evaluate(loss, batch())
  # Of vqa only row 3 has that answer.
  valid = np.asarray(batch()["valid"])
  inside = valid & (np.asarray(batch()["task"]) != VQA)
  inside[3] = True
  rows = {**batch(), "valid": jnp.asarray(inside)}
  alone = evaluate(loss, rows)
  for name in ("loss", "weight", "norm"):
    assert float(metrics[name]) == pytest.approx(float(alone[name]), rel=1e-6)
  assert float(metrics["examples"]) == valid.sum()
  assert float(metrics["infeasible_fraction"]) == pytest.approx(3 / 7)
  assert float(alone["infeasible_fraction"]) == 0


def test_micro_batches_give_the_gradient_of_the_whole() -> None:
  """Labels, not examples, are averaged: micro-batches have 6 and 10."""
  updated = []
  for steps in (1, 2):
    config = StepConfig(
      task_names=TASKS,
      objective=autoregressive_loss(label_smoothing=0.1),
      accumulation_steps=steps,
    )
    params = decoder_variables()["params"]
    optimizer = optax.sgd(1.0)
    step = make_train_step(
      Decoder(),
      optimizer,
      optax.constant_schedule(1.0),
      {"embed_tokens": ParameterRule()},
      config,
    )
    state = TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats={},
      opt_state=optimizer.init(params),
      ema=None,
    )
    state, metrics = jax.jit(step)(state, batch(), jax.random.key(0))
    updated.append(params["embed_tokens"] - state.params["embed_tokens"])
    assert float(metrics["examples"]) == B - 1
  assert np.linalg.norm(updated[0]) > 0.01
  np.testing.assert_allclose(updated[0], updated[1], rtol=1e-5, atol=1e-7)
