"""A small NARVL against recorded outputs and gradients of the official code.

The recorded files hold outputs only; the weights come from names and shapes.
The official run had dropout and stochastic depth switched off.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.interop import official_from_variables, variables_from_official
from narvl_jax.models import NARVL, model_config
from narvl_jax.query_ctc import collapse, query_ctc_objective
from narvl_jax.state.parameters import ParameterRule, flatten
from narvl_jax.state.train_state import make_first_state
from narvl_jax.training.objective import QueryCtcLoss
from narvl_jax.training.optimizer import make_optimizer, make_schedule
from narvl_jax.training.train_step import StepConfig, make_train_step
from tests.models.recorded import (
  Outputs,
  Recorded,
  State,
  compare_gradients,
  compare_outputs,
  compare_weights,
  inputs,
  read_recorded,
)

CONFIG = model_config(
  "micro",
  resnet_width=64,
  max_text_positions=1026,
  image_bucket_size=42,
  num_queries=5,
  vocab_size=253,
  dropout=0.0,
)
MODEL = NARVL(CONFIG)
BLANK, PAD = 252, 1


class Step(NamedTuple):
  """Loss, batch statistics and gradient in the official layout."""

  loss: float
  stats: State
  gradient: State


@functools.partial(jax.jit, static_argnames="smoothing")
def objective(
  logits: jax.Array,
  labels: jax.Array,
  confidence: jax.Array,
  smoothing: float,
) -> jax.Array:
  loss, _ = query_ctc_objective(
    logits,
    labels,
    jnp.sum(labels != PAD, axis=1),
    blank_id=BLANK,
    label_smoothing=smoothing,
    confidence=confidence,
    confidence_mode="temper",
  )
  return loss


def make_step(recorded: Recorded, *, train: bool) -> Callable[[State], Step]:
  """Returns a function of official weights: target "full", smoothing 0.1."""
  image, text, mask = inputs(recorded)
  labels = jnp.asarray(recorded.arrays["target_full"])

  @jax.jit
  def compute(params: Any, stats: Any) -> Any:
    def loss(params: Any) -> tuple[jax.Array, Any]:
      (logits, _), updates = MODEL.apply(
        {"params": params, "batch_stats": stats},
        image,
        text,
        image_mask=mask,
        train=train,
        mutable=["batch_stats"],
      )
      return objective(logits, labels, jnp.ones(3), 0.1), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, updates["batch_stats"], grads

  def run(state: State) -> Step:
    variables = variables_from_official(state, CONFIG)
    value, stats, grads = jax.device_get(
      compute(variables["params"], variables["batch_stats"])
    )
    new = {"params": variables["params"], "batch_stats": stats}
    stats = official_from_variables(new, CONFIG)
    gradient = official_from_variables({"params": grads}, CONFIG)
    return Step(
      float(value),
      {key: value for key, value in stats.items() if "running" in key},
      gradient,
    )

  return run


@pytest.fixture(scope="module")
def recorded(shared_files: pathlib.Path) -> Recorded:
  return read_recorded(shared_files, "micro_nar", CONFIG)


@pytest.fixture(scope="module")
def outputs(recorded: Recorded) -> Outputs:
  image, text, mask = inputs(recorded)
  variables = variables_from_official(recorded.state, CONFIG)
  apply = jax.jit(lambda v: MODEL.apply(v, image, text, image_mask=mask))
  return jax.device_get(apply(variables))


@pytest.fixture(scope="module")
def train_step(recorded: Recorded) -> Callable[[State], Step]:
  return make_step(recorded, train=True)


def test_weights(recorded: Recorded) -> None:
  compare_weights(recorded)


def test_outputs(recorded: Recorded, outputs: Outputs) -> None:
  compare_outputs(recorded, outputs)


def test_greedy(recorded: Recorded, outputs: Outputs) -> None:
  arrays = recorded.arrays
  log_probs = jax.nn.log_softmax(outputs[0])
  ids = log_probs.argmax(-1)
  sure = arrays["greedy_margin"] > 1e-3
  assert sure.mean() > 0.5
  np.testing.assert_array_equal(ids[sure], arrays["greedy"][sure])
  np.testing.assert_allclose(
    log_probs.max(-1), arrays["greedy_logprob"], atol=1e-4
  )


@pytest.mark.parametrize("mode", ["plain", "collapse"])
def test_collapse(
  recorded: Recorded,
  outputs: Outputs,
  mode: str,
) -> None:
  ids, lengths = collapse(
    jnp.asarray(outputs[0].argmax(-1)),
    blank_id=BLANK,
    pad_id=PAD,
    merge_repeats=mode == "collapse",
  )
  for row, length, official in zip(
    ids, lengths, recorded.about["generate"][mode], strict=True
  ):
    # The official code drops blanks only when it makes the text.
    expected = [i for i in official["tokens"] if i != BLANK]
    assert row[:length].tolist() == expected


def test_losses(recorded: Recorded, outputs: Outputs) -> None:
  for row in recorded.about["losses"]:
    target, smoothing, mode, expected, *_ = row
    confidence = recorded.arrays["conf"] if mode == "conf" else np.ones(3)
    labels = recorded.arrays[f"target_{target}"]
    loss = objective(
      *map(jnp.asarray, (outputs[0], labels, confidence)), smoothing
    )
    assert float(loss) == pytest.approx(expected, abs=1e-4), row


def test_gradients(recorded: Recorded) -> None:
  gradient = make_step(recorded, train=False)(recorded.state).gradient
  assert compare_gradients(recorded, "full_0.1_none", gradient) == 33


def test_one_training_step(
  recorded: Recorded, train_step: Callable[[State], Step]
) -> None:
  step = train_step(recorded.state)
  _, loss, norm, *_ = recorded.about["train_steps"]["rows"][0]
  assert step.loss == pytest.approx(loss, abs=1e-4)
  assert global_norm(step.gradient) == pytest.approx(norm, rel=1e-5)
  expected = {
    key.removeprefix("train1/"): value
    for key, value in recorded.arrays.items()
    if key.startswith("train1/")
  }
  assert expected
  for name, value in expected.items():
    np.testing.assert_allclose(
      step.stats[name], value, rtol=1e-5, atol=1e-6, err_msg=name
    )


def test_three_updates(recorded: Recorded) -> None:
  """The project's whole update, with the optimizer of the recipes."""
  image, text, mask = inputs(recorded)
  labels = jnp.asarray(recorded.arrays["target_full"])
  batch = {
    "image": image,
    "text": text,
    "image_mask": mask,
    "labels": labels,
    "label_length": jnp.sum(labels != PAD, axis=1),
    "confidence": jnp.ones(3),
    "task": jnp.zeros(3, jnp.int32),
    "valid": jnp.ones(3, bool),
  }
  variables = variables_from_official(recorded.state, CONFIG)
  rules = dict.fromkeys(flatten(variables["params"]), ParameterRule(decay=1.0))
  official = make_schedule(
    learning_rate=5e-5, schedule="linear", warmup_steps=1, steps=20
  )

  def schedule(step: Any) -> Any:
    # The recorded run skips the first update, whose rate is 0.
    return official(jnp.maximum(step, 1))

  optimizer = make_optimizer(
    schedule,
    rules,
    weight_decay=0.01,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_placement="official",
    clip_norm=1.0,
  )
  settings = StepConfig(
    task_names=("all",),
    objective=QueryCtcLoss(BLANK, CONFIG.vocab_size, 0.1, "temper"),
  )
  update = jax.jit(make_train_step(MODEL, optimizer, schedule, rules, settings))
  state = make_first_state(optimizer, rules, ema=False)(variables)
  for _, loss, norm, rate, _ in recorded.about["train_steps"]["rows"]:
    state, metrics = update(state, batch, jax.random.key(0))
    assert metrics["loss"] == pytest.approx(loss, abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["learning_rate"] == pytest.approx(rate)
  trained = official_from_variables(
    jax.device_get({"params": state.params, "batch_stats": state.batch_stats}),
    CONFIG,
  )
  for key, value in recorded.arrays.items():
    if key.startswith("train3/"):
      name = key.removeprefix("train3/")
      np.testing.assert_allclose(
        trained[name], value, rtol=0, atol=4e-6, err_msg=name
      )
  for name, (total, *_) in recorded.about["train_steps"]["params"].items():
    if name in trained:
      value = trained[name].astype(np.float64)
      assert value.sum() == pytest.approx(total, abs=2e-6 * value.size), name


def global_norm(gradient: State) -> float:
  """Norm over all parameters, the tied table counted once."""
  squares = [
    np.square(value, dtype=np.float64).sum()
    for key, value in gradient.items()
    if not key.startswith(("decoder.embed_tokens", "decoder.output_proj"))
  ]
  return float(np.sqrt(sum(squares)))
