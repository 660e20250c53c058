"""The head without logits against the one that has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.ahead_of_time.program import read_program
from narvl_jax.errors import UserError
from narvl_jax.models import project
from narvl_jax.query_ctc import (
  ChunkedLogits,
  query_ctc_loss,
  query_ctc_objective,
)

B, N, L, D, ROWS, CLASSES = 6, 5, 3, 12, 100, 91
BLANK = CLASSES - 1


@functools.cache
def problem(scale=1.0):
  rng = np.random.default_rng(0)
  states = scale * rng.standard_normal((B, N, D), np.float32)
  table = rng.standard_normal((ROWS, D), np.float32)
  # Padding that would win everywhere.
  table[CLASSES:] = 50.0
  # With a repeat, blank as padding, one that does not fit, and an empty one.
  labels = rng.integers(0, BLANK, (B, L))
  labels[0], labels[1], labels[2] = (7, 7, 7), (3, 3, BLANK), (0, 89, 45)
  return states, table, labels, np.array([3, 2, 3, 0, 1, 2])


@functools.partial(
  jax.jit, static_argnames=("chunk", "smoothing", "mode", "classes")
)
def run(
  states,
  table,
  labels,
  lengths,
  chunk,
  smoothing=0.1,
  mode="weight",
  classes=CLASSES,
):
  """Objective, metrics and the gradients of states and table."""

  def loss(states, table):
    logits = (
      ChunkedLogits(states, table, chunk) if chunk else project(states, table)
    )
    return query_ctc_objective(
      logits,
      labels,
      lengths,
      blank_id=BLANK,
      vocab_size=classes,
      label_smoothing=smoothing,
      confidence=jnp.linspace(0.2, 1.0, B),
      confidence_mode=mode,
      example_mask=jnp.arange(B) != 4,
    )

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(states, table)


def assert_same(found, expected, tolerance):
  (loss, metrics), gradients = found
  (expected_loss, expected_metrics), expected_gradients = expected
  np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=tolerance)
  for x, y in zip(gradients, expected_gradients, strict=True):
    assert x.dtype == y.dtype
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    assert np.linalg.norm(x - y) < tolerance * np.linalg.norm(y)


@pytest.mark.parametrize("chunk", [1, 16, 90, 4096])
def test_any_chunk_size_gives_the_same(chunk):
  """Chunks that divide the table, overlap, and hold it all."""
  found = run(*problem(), chunk)
  assert_same(found, run(*problem(), 0), 2e-6)
  assert not np.any(found[1][1][CLASSES:])
  assert np.all(np.any(found[1][1][:CLASSES] != 0, axis=1))


@pytest.mark.parametrize("mode", ["weight", "temper"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_every_objective_is_the_same(mode, smoothing):
  settings = {"smoothing": smoothing, "mode": mode}
  found = run(*problem(), 16, **settings)
  assert_same(found, run(*problem(), 0, **settings), 2e-6)


def test_a_table_without_padding():
  states, table, labels, lengths = problem()
  args = states, table[:CLASSES], labels, lengths
  for chunk in (13, 20):  # 91 = 7 * 13.
    assert_same(run(*args, chunk), run(*args, 0), 2e-6)


def test_large_logits():
  """Plain exponentials would overflow or vanish."""
  states, table, labels, lengths = problem(scale=60.0)
  assert np.abs(states @ table[:CLASSES].T).max() > 300
  args = states, table, labels, lengths
  assert_same(run(*args, 16), run(*args, 0), 1e-5)


def test_half_precision():
  states, table, labels, lengths = problem()
  half = jnp.asarray(states, jnp.bfloat16)
  found = run(half, table, labels, lengths, 16)
  assert found[1][0].dtype == jnp.bfloat16
  assert found[1][1].dtype == jnp.float32
  # The logits agree; gradients are rounded to half precision on the way.
  expected = run(half, table, labels, lengths, 0)
  np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-5)
  assert_same(found, expected, 2**-7)


def test_gradient_against_differences():
  """Against the loss itself, not another gradient."""
  states, table, labels, lengths = problem()

  @jax.jit
  def loss(states, table):
    return query_ctc_loss(
      ChunkedLogits(states, table, 16),
      jnp.asarray(labels),
      jnp.asarray(lengths),
      blank_id=BLANK,
      vocab_size=CLASSES,
      label_smoothing=0.1,
    ).sum()

  rng = np.random.default_rng(1)
  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(states, table)
  for index, x in enumerate((states, table)):
    step = rng.standard_normal(x.shape).astype(np.float32) * 1e-3
    step[CLASSES:] = 0 if index else step[CLASSES:]
    args = [states, table]
    ends = []
    for sign in (1, -1):
      args[index] = x + sign * step
      ends.append(float(loss(*args)))
    slope = float(np.vdot(gradients[index], step))
    np.testing.assert_allclose((ends[0] - ends[1]) / 2, slope, rtol=2e-3)


def compiled(chunk, classes=2000):
  args = [
    jax.ShapeDtypeStruct((B, N, 8), jnp.float32),
    jax.ShapeDtypeStruct((classes, 8), jnp.float32),
    jax.ShapeDtypeStruct((B, L), jnp.int32),
    jax.ShapeDtypeStruct((B,), jnp.int32),
  ]
  return run.lower(*args, chunk, classes=classes).compile()


def test_never_has_the_logits():
  logits = B * N * 2000
  plain, chunked = compiled(0), compiled(100)
  sizes = [
    {array.size for array in read_program(x.as_text()).arrays}
    for x in (plain, chunked)
  ]
  assert max(sizes[0]) == logits
  # Blocks of two examples: one has fewer logits than the table has numbers.
  block = 2 * N * 2000
  assert max(sizes[1]) == block
  temps = []
  for step in (plain, chunked):
    memory = step.memory_analysis()
    assert memory is not None
    temps.append(memory.temp_size_in_bytes)
  assert temps[0] > 4 * logits
  # The gradient of the table, and a block of logits.
  assert temps[1] < 4 * (2 * 2000 * 8 + block) + 2**15


def test_labels_array_without_columns():
  states, table, _, _ = problem()
  args = states, table, np.zeros((B, 0), np.int32), np.zeros(B, np.int32)
  assert_same(run(*args, 16), run(*args, 0), 2e-6)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunk_size_must_be_positive(chunk):
  states, table, labels, lengths = map(jnp.asarray, problem())
  logits = ChunkedLogits(states, table, chunk)
  with pytest.raises(UserError, match=rf"chunk size {chunk} .*loss.chunk_size"):
    query_ctc_loss(logits, labels, lengths, blank_id=BLANK)


def test_vmap_gives_the_same():
  states, table, labels, lengths = problem()
  many = jnp.stack([states, 2 * states])
  both = jax.vmap(lambda s: run(s, table, labels, lengths, 16))(many)
  for index in range(2):
    one = jax.tree.map(lambda x, i=index: x[i], both)
    assert_same(one, run(many[index], table, labels, lengths, 0), 2e-6)
