"""The losses around a model: prompts, constraints, accumulation, a teacher.

The models are stand-ins that compile in a moment; what surrounds them is real.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from narvl_jax.data.example import TASKS
from narvl_jax.decoding.constraint import answer_trie
from narvl_jax.models import project
from narvl_jax.parallel import (
  BATCH_AXES,
  VOCAB_AXIS,
  WIDTH_AXIS,
  make_mesh,
  shard_batch,
)
from narvl_jax.query_ctc import MeshAxes, label_posterior
from narvl_jax.training.objective import (
  AutoregressiveLoss,
  DistillationLoss,
  QueryCtcLoss,
)
from narvl_jax.training.optimizer import ParameterRule
from narvl_jax.training.teacher import Teacher
from narvl_jax.training.train_state import TrainState
from narvl_jax.training.train_step import StepConfig, make_train_step
from tests.query_ctc.reference import log_softmax

B, T, L, N, V, D = 8, 5, 3, 4, 12, 6
BOS, PAD, EOS = 0, 1, 2
BLANK = V
CAPTION, VQA = TASKS.index("caption"), TASKS.index("vqa")
PROMPTED = tuple(name == "vqa" for name in TASKS)
KEY = jax.random.key(0)


class Decoder(nn.Module):
  """Each state depends on all tokens so far and on where they stand."""

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    tokens: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict]:
    del image_mask, train
    table = self.param("embed_tokens", nn.initializers.normal(0.5), (16, D))
    seen = (tokens != PAD)[..., None] * table[tokens]
    places = 1.0 + jnp.arange(tokens.shape[1])
    states = jnp.cumsum(seen * places[:, None], axis=1) / places[:, None]
    states += image.mean((1, 2))[:, :1, None] + table[text].mean(1)[:, None]
    return project(states, table[:V]), {"decoder_out": jnp.tanh(states)}


class Queries(nn.Module):
  """N queries of a source; blank is one more class."""

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict]:
    del image, image_mask, train
    table = self.param("embed_tokens", nn.initializers.normal(0.5), (16, D))
    queries = self.param("queries", nn.initializers.normal(0.5), (N, D))
    states = table[text].mean(1)[:, None] + queries
    return project(states, table[: V + 1]), {"decoder_out": states}


@functools.cache
def batch() -> dict[str, jax.Array]:
  """Rows of two tasks; all differ in the lengths of source and target."""
  rng = np.random.default_rng(0)
  text = rng.integers(3, V, (B, T)).astype(np.int32)
  lengths = rng.integers(3, T + 1, B)
  text[:, 0] = BOS
  for row, length in zip(text, lengths, strict=True):
    row[length - 1], row[length:] = EOS, PAD
  label_length = np.array([3, 1, 2, 3, 1, 3, 2, 1], np.int32)
  labels = rng.integers(3, V, (B, L)).astype(np.int32)
  for row, length in zip(labels, label_length, strict=True):
    row[length - 1], row[length:] = EOS, PAD
  rows = {
    "image": rng.normal(size=(B, 2, 2, 3)).astype(np.float32),
    "image_mask": np.ones(B, bool),
    "text": text,
    "labels": labels,
    "label_length": label_length,
    "confidence": rng.uniform(0.2, 1.0, B).astype(np.float32),
    "task": np.where(np.arange(B) % 2, VQA, CAPTION).astype(np.int32),
    "valid": np.arange(B) != 6,
  }
  return {name: jnp.asarray(x) for name, x in rows.items()}


@functools.cache
def decoder_variables() -> Any:
  rows = batch()
  init = jax.jit(Decoder().init)
  return init(KEY, rows["image"], rows["text"], rows["text"])


@functools.cache
def query_variables() -> Any:
  init = jax.jit(Queries().init)
  return init(jax.random.key(1), batch()["image"], batch()["text"])


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


def log_probs_by_hand(row: Any) -> np.ndarray:
  """Returns [labels, V] from a sequence that is written out for one row."""
  rows = jax.device_get(batch())
  source = [int(x) for x in rows["text"][row] if x != PAD]
  labels = rows["labels"][row][: rows["label_length"][row]].tolist()
  prompt = source[:-1] if rows["task"][row] == VQA else [BOS]
  table = np.asarray(decoder_variables()["params"]["embed_tokens"])
  tokens = prompt + labels[:-1]
  places = 1.0 + np.arange(len(tokens))[:, None]
  states = np.cumsum(table[tokens] * places, axis=0) / places
  states += rows["image"][row].mean((0, 1))[0]
  states += table[rows["text"][row]].mean(0)
  return log_softmax(np.tanh(states[len(prompt) - 1 :]) @ table[:V].T)


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
      seed=0,
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
    state, metrics = jax.jit(step)(state, batch())
    updated.append(params["embed_tokens"] - state.params["embed_tokens"])
    assert float(metrics["examples"]) == B - 1
  assert np.linalg.norm(updated[0]) > 0.01
  np.testing.assert_allclose(updated[0], updated[1], rtol=1e-5, atol=1e-7)


@functools.cache
def teacher() -> Teacher:
  """A teacher that only computes; it is the decoder above."""
  model: Any = Decoder()
  return Teacher(
    path="",
    step=0,
    model=model,
    prompted=PROMPTED,
    pad_id=PAD,
    answer_positions=(T + L - 2, L),
    shapes={},
    shardings={},
  )


def distillation_loss(weight: float, **settings: Any) -> DistillationLoss:
  labels = QueryCtcLoss(blank_id=BLANK, vocab_size=V + 1)
  labels = dataclasses.replace(labels, chunk_size=settings.pop("chunk_size", 0))
  return DistillationLoss(
    labels, teacher(), decoder_variables(), weight, **settings
  )


def student_loss(
  loss: Any, variables: Any, rows: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
  value, metrics, _ = loss(Queries(), variables, rows, KEY, jnp.zeros(()))
  return value, metrics


@functools.cache
def labels_alone() -> tuple[jax.Array, dict[str, jax.Array]]:
  """Loss and metrics of the labels."""
  loss = distillation_loss(0.0).labels
  return jax.jit(functools.partial(student_loss, loss))(
    query_variables(), batch()
  )


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
  return np.exp(log_softmax(logits / temperature))


@pytest.mark.parametrize(("temperature", "chunk_size"), [(1.0, 0), (2.0, 5)])
def test_distillation_by_its_formula(
  temperature: float, chunk_size: int
) -> None:
  rows = jax.device_get(batch())
  variables: Any = query_variables()
  table = np.asarray(variables["params"]["embed_tokens"])
  queries = np.asarray(variables["params"]["queries"])
  logits = (table[rows["text"]].mean(1)[:, None] + queries) @ table.T
  posterior = functools.partial(
    label_posterior, blank_id=BLANK, vocab_size=V + 1
  )
  gamma = np.asarray(
    jax.jit(posterior)(logits, rows["labels"], rows["label_length"])
  )
  terms = []
  for row in np.flatnonzero(rows["valid"]):
    # log_probs_by_hand is of the teacher; logits up to a constant.
    q = softened(log_probs_by_hand(row), temperature)
    p = softened(logits[row, :, :V], temperature)
    divergence = np.sum(q * np.log(q / p[:, None]), axis=-1)
    length = len(q)
    share = gamma[row, :, :length] / gamma[row, :, :length].sum(0)
    terms.append(temperature**2 * np.sum(share * divergence) / length)
  loss = distillation_loss(0.25, temperature=temperature, chunk_size=chunk_size)
  value, metrics = jax.jit(functools.partial(student_loss, loss))(
    variables, batch()
  )
  assert float(metrics["distillation"]) == pytest.approx(
    np.mean(terms), rel=1e-4
  )
  plain, expected = labels_alone()
  assert float(value) == pytest.approx(
    0.75 * float(plain) + 0.25 * np.mean(terms), rel=1e-4
  )
  assert float(metrics["loss"]) == float(value)
  assert float(metrics["nll"]) == pytest.approx(float(expected["nll"]))


def gradient_of(loss: DistillationLoss, rows: dict[str, jax.Array]) -> Any:
  function = jax.grad(functools.partial(student_loss, loss), has_aux=True)
  return jax.jit(function)(query_variables(), rows)[0]


def test_the_gradient_of_chunks_is_that_of_the_whole() -> None:
  whole = gradient_of(distillation_loss(1.0), batch())
  chunks = gradient_of(distillation_loss(1.0, chunk_size=5), batch())
  for a, b in zip(*map(jax.tree.leaves, (whole, chunks)), strict=True):
    assert np.linalg.norm(a) > 1e-3
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [0, 5])
def test_devices_that_share_batch_and_classes_change_nothing(
  chunk_size: int,
) -> None:
  whole = gradient_of(distillation_loss(1.0), batch())
  mesh = make_mesh(2, 2, 2)
  table = NamedSharding(mesh, PartitionSpec(VOCAB_AXIS, WIDTH_AXIS))
  loss = distillation_loss(1.0, chunk_size=chunk_size)
  axes = MeshAxes(batch=BATCH_AXES, vocab=VOCAB_AXIS, width=WIDTH_AXIS)
  labels = dataclasses.replace(loss.labels, axes=axes)

  def gradient(theirs: Any, ours: Any, rows: Any) -> Any:
    split = dataclasses.replace(loss, labels=labels, variables=theirs)
    objective = functools.partial(student_loss, split)
    return jax.grad(objective, has_aux=True)(ours, rows)[0]

  placed = [
    jax.tree.map(lambda x: jax.device_put(x, table), tree)
    for tree in (decoder_variables(), query_variables())
  ]
  with jax.set_mesh(mesh):
    split = jax.jit(gradient)(
      *placed, shard_batch(jax.device_get(batch()), mesh)
    )
  for a, b in zip(*map(jax.tree.leaves, (whole, split)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_targets_that_do_not_fit_teach_nothing() -> None:
  rows = dict(batch())
  # Five equal labels, or three with the blanks between them, exceed N = 4.
  rows["labels"] = jnp.full((B, L), 7)
  rows["label_length"] = jnp.full(B, 3)
  gradient = gradient_of(distillation_loss(1.0), rows)
  for leaf in jax.tree.leaves(gradient):
    assert not np.any(leaf)


def test_the_student_moves_towards_its_teacher() -> None:
  """The labels are one class; the teacher has other ideas of the first."""
  rows = dict(batch())
  rows["labels"] = jnp.full((B, L), PAD).at[:, 0].set(5)
  rows["label_length"] = jnp.ones(B, jnp.int32)
  loss = distillation_loss(1.0)
  step = jax.jit(
    jax.value_and_grad(functools.partial(student_loss, loss), has_aux=True)
  )
  variables = query_variables()
  found = []
  for _ in range(60):
    (value, _), gradient = step(variables, rows)
    found.append(float(value))
    variables = jax.tree.map(lambda x, g: x - 0.3 * g, variables, gradient)
  assert found[-1] < 0.5 * found[0]
  # Labels alone lead away from it.
  variables = query_variables()
  labels = jax.jit(
    jax.grad(functools.partial(student_loss, loss.labels), has_aux=True)
  )
  for _ in range(60):
    gradient, _ = labels(variables, rows)
    variables = jax.tree.map(lambda x, g: x - 0.3 * g, variables, gradient)
  (value, _), _ = step(variables, rows)
  assert float(value) > found[0]
