"""The posterior of the alignment against the enumeration of all paths."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.query_ctc import ChunkedLogits, label_posterior
from tests.query_ctc import reference

N, V, L, D, BLANK = 4, 4, 4, 3, 3
TARGETS = (
  (),
  (0,),
  (1, 2),
  (0, 0),
  (2, 2, 1),
  (0, 1, 0),
  (0, 1, 2, 0),
  (0, 1, 1, 0),  # Infeasible.
)
FEASIBLE = slice(0, 7)


def enumerate_posterior(logits: np.ndarray, target: tuple[int, ...]):
  """Sums over all paths: the place of the target that each query emits."""
  log_probs = reference.log_softmax(logits)
  visits, total = np.zeros((N, L)), 0.0
  for path in itertools.product(range(V), repeat=N):
    places, place = [], -1
    for before, label in zip((BLANK, *path), path, strict=False):
      place += label not in (BLANK, before)
      places.append(None if label == BLANK else place)
    said = [label for label, _ in itertools.groupby(path) if label != BLANK]
    if tuple(said) != target:
      continue
    p = np.exp(log_probs[np.arange(N), path].sum())
    total += p
    for query, place in enumerate(places):
      if place is not None:
        visits[query, place] += p
  return visits / total


def problem() -> tuple[jax.Array, ...]:
  """States and table of logits that are far from even, labels and lengths."""
  rng = np.random.default_rng(0)
  states = rng.normal(0, 1.5, (len(TARGETS), N, D)).astype(np.float32)
  table = rng.normal(0, 1.5, (V, D)).astype(np.float32)
  # Padding contains an id that is a label elsewhere.
  labels = np.full((len(TARGETS), L), 1, np.int32)
  for row, target in zip(labels, TARGETS, strict=True):
    row[: len(target)] = target
  lengths = np.array([len(target) for target in TARGETS], np.int32)
  return tuple(map(jnp.asarray, (states, table, labels, lengths)))


@functools.cache
def computed() -> tuple[np.ndarray, np.ndarray]:
  """The logits and the posterior."""
  states, table, labels, lengths = problem()
  logits = states @ table.T
  posterior = jax.jit(functools.partial(label_posterior, blank_id=BLANK))
  return np.asarray(logits), np.asarray(posterior(logits, labels, lengths))


def test_equals_the_sum_over_all_paths() -> None:
  logits, posterior = computed()
  assert posterior.shape == (len(TARGETS), N, L)
  for row, target in enumerate(TARGETS[FEASIBLE]):
    expected = enumerate_posterior(logits[row], target)
    np.testing.assert_allclose(
      posterior[row], expected, atol=2e-6, err_msg=str(target)
    )


def test_every_label_is_said_and_padding_is_not() -> None:
  _, posterior = computed()
  for row, target in enumerate(TARGETS[FEASIBLE]):
    assert np.all(posterior[row].sum(0)[: len(target)] >= 1 - 1e-5)
    assert not np.any(posterior[row, :, len(target) :])
  assert np.all(posterior.sum(-1) <= 1 + 1e-5)
  # An infeasible target has no posterior.
  assert not np.any(posterior[-1])


def test_no_label_is_impossible() -> None:
  """Log-probabilities of -1000 leave a posterior, not NaN."""
  logits = jnp.zeros((1, N, V)).at[:, :, 0].set(-1e3)
  posterior = label_posterior(
    logits, jnp.array([[0, 1]]), jnp.array([2]), blank_id=BLANK
  )
  assert np.all(np.isfinite(posterior))
  np.testing.assert_allclose(posterior[0, :, 0].sum(), 1, rtol=1e-3)


def test_chunks_and_padding_do_not_change_the_result() -> None:
  states, table, labels, lengths = problem()
  padded = jnp.concatenate([table, jnp.full((3, D), 9.0)])
  posterior = label_posterior(
    ChunkedLogits(states, padded, 3),
    labels,
    lengths,
    blank_id=BLANK,
    vocab_size=V,
  )
  np.testing.assert_allclose(posterior, computed()[1], atol=2e-6)


def test_has_no_gradient() -> None:
  states, table, labels, lengths = problem()

  def total(table: jax.Array) -> jax.Array:
    posterior = label_posterior(
      states @ table.T, labels, lengths, blank_id=BLANK
    )
    return jnp.sum(posterior**2)

  assert not np.any(jax.grad(total)(table))


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e9])
def test_equal_alignments_have_equal_shares(magnitude: float) -> None:
  """All queries are alike, so that alignments of "0 1" with 6 blanks tie."""
  row = -magnitude * jnp.array([1.2345, 0.777, 0.0, 0.2])
  posterior = label_posterior(
    jnp.tile(row, (1, 8, 1)), jnp.array([[0, 1]]), jnp.array([2]), blank_id=3
  )
  # Of 28 pairs of queries, 7 - i have the first label at query i.
  np.testing.assert_allclose(
    posterior[0, :, 0], np.arange(7, -1, -1) / 28, atol=1e-5
  )
