"""Entropies and distributions of coordinates, on random logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding.greedy import greedy_decode
from narvl_jax.decoding.likelihood import (
  coordinate_distributions,
  query_entropy,
)
from narvl_jax.query_ctc import MeshAxes

B, N, V, BLANK, PAD = 6, 7, 20, 19, 1
FIRST, COUNT = 8, 10


def softmax(x: np.ndarray) -> np.ndarray:
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def test_entropy_ignores_impossible_classes() -> None:
  logits = np.random.default_rng(0).normal(0, 3, (B, N, V)).astype(np.float32)
  logits[..., 3] = -np.inf
  logits[0, 0] = -np.inf
  logits[0, 0, 5] = 2.0
  probs = softmax(logits.astype(np.float64))
  terms = np.where(probs > 0, probs * np.log(np.where(probs > 0, probs, 1)), 0)
  found = jax.jit(query_entropy, static_argnums=1)(logits, MeshAxes())
  np.testing.assert_allclose(found, -terms.sum(-1), rtol=1e-5, atol=1e-6)
  assert found[0, 0] == 0


@pytest.mark.parametrize("merge", [True, False])
def test_coordinates_have_the_distributions_of_their_queries(
  merge: bool,
) -> None:
  rng = np.random.default_rng(1)
  logits = rng.normal(0, 1, (B, N, V)).astype(np.float32)
  # Places of x0, y0, x1 and y1 among the seven queries, in order.
  queries = np.sort([rng.permutation(N)[:4] for _ in range(B)], axis=1)
  bins = np.array([rng.permutation(COUNT)[:4] for _ in range(B)])
  logits[..., BLANK] += 9
  rows = np.arange(B)[:, None]
  logits[rows, queries, BLANK] -= 18
  logits[rows, queries, FIRST + bins] += 9
  decoded = greedy_decode(
    jnp.asarray(logits), jnp.full(B, merge), blank_id=BLANK, pad_id=PAD
  )
  np.testing.assert_array_equal(decoded["ids"][:, :4], FIRST + bins)
  found, probs = coordinate_distributions(
    jnp.asarray(logits),
    decoded["ids"],
    decoded["lengths"],
    jnp.full(B, merge),
    blank_id=BLANK,
    bins=(FIRST, COUNT),
    axes=MeshAxes(),
  )
  expected = softmax(logits[rows, queries][..., FIRST : FIRST + COUNT])
  np.testing.assert_array_equal(found[..., 0], bins)
  np.testing.assert_allclose(
    probs, np.take_along_axis(expected, np.asarray(found), -1), rtol=1e-5
  )
  assert np.all(np.diff(probs, axis=-1) <= 0)
  np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
