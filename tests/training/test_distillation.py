"""Per-token distillation: formula, gradient, chunks, devices, its direction."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from narvl_jax.parallel import (
  BATCH_AXES,
  VOCAB_AXIS,
  WIDTH_AXIS,
  make_mesh,
  shard_batch,
)
from narvl_jax.query_ctc import MeshAxes, label_posterior
from narvl_jax.training.divergence import token_divergences
from narvl_jax.training.objective import DistillationLoss, QueryCtcLoss
from narvl_jax.training.teacher import Teacher
from tests.query_ctc.reference import log_softmax
from tests.support.stand_in_decoders import (
  BLANK,
  KEY,
  PAD,
  PROMPTED,
  B,
  Decoder,
  L,
  Queries,
  T,
  V,
  batch,
  decoder_variables,
  log_probs_by_hand,
  query_variables,
)


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


# Chunks of one class: that of blank has nothing but masked logits.
@pytest.mark.parametrize("chunk_size", [0, 1])
@pytest.mark.parametrize("magnitude", [1.0, -1e30, -1e32])
def test_divergence_of_logits_of_any_magnitude(
  magnitude: float, chunk_size: int
) -> None:
  # Logits magnitude * (1, 2, 4) of student and teacher; the last is blank.
  table = jnp.array([[1.0], [2.0], [4.0], [0.0]])

  def mean(states: jax.Array) -> jax.Array:
    found = token_divergences(
      states,
      table,
      jnp.full((1, 1, 1), magnitude),
      table[:3],
      blank_id=3,
      vocab_size=4,
      chunk_size=chunk_size,
    )
    return jnp.mean(found)

  states = jnp.full((1, 2, 1), magnitude)
  value, gradient = jax.value_and_grad(mean)(states)
  np.testing.assert_allclose(value, 0.0, atol=1e-6)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


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


def test_targets_that_do_not_fit_have_no_gradient() -> None:
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
