"""Biases of relative positions against looking up every pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.models import positions
from narvl_jax.models.relative_bias import image_bias, token_bias


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (4, 3), (5, 5)])
def test_image_bias_is_a_lookup_of_all_pairs(height, width):
  rng = np.random.default_rng(0)
  rows = positions.num_image_buckets(5)
  table = rng.standard_normal((2, rows, 3)).astype(np.float32)
  weight = rng.standard_normal((2, 3, height * width, height * width))
  buckets = positions.image_buckets(height, width, 5)

  def lookup(table: jax.Array) -> jax.Array:
    return table[:, buckets].transpose(0, 3, 1, 2)

  def expanded(table: jax.Array) -> jax.Array:
    return image_bias(table, height, width, 5)

  np.testing.assert_array_equal(
    expanded(jnp.asarray(table)), lookup(jnp.asarray(table))
  )
  gradients = [
    jax.grad(lambda t, f=f: jnp.sum(f(t) * weight))(jnp.asarray(table))
    for f in (expanded, lookup)
  ]
  np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-5)


def test_image_bias_keeps_bfloat16_exactly():
  table = jax.random.normal(
    jax.random.key(0), (1, positions.num_image_buckets(4), 2), jnp.bfloat16
  )
  bias = image_bias(table, 3, 4, 4)
  assert bias.dtype == jnp.bfloat16
  buckets = positions.image_buckets(3, 4, 4)
  np.testing.assert_array_equal(bias, table[:, buckets].transpose(0, 3, 1, 2))


def test_token_bias_is_a_lookup():
  table = np.arange(2 * 31 * 3.0).reshape(2, 31, 3)
  bias = token_bias(jnp.asarray(table), 6, 16)
  assert bias.shape == (2, 3, 6, 6)
  bucket = positions.token_buckets(6, 16)[4, 1]
  np.testing.assert_array_equal(bias[1, :, 4, 1], table[1, bucket])
