"""Attention biases that depend only on the distance between two positions.

Tables and biases have a leading axis G of copies, one for each part of the
batch (`parallel.constraints.per_device`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.models import positions
from narvl_jax.parallel.constraints import constrain


def token_bias(table: jax.Array, length: int, bucket_size: int) -> jax.Array:
  """Returns the bias of pairs of text tokens or queries.

  Args:
    table: [G, R, H], a bias for every bucket and head.
    length: T, number of tokens.
    bucket_size: see `positions.token_buckets`.

  Returns:
    [G, H, T, T].
  """
  buckets = positions.token_buckets(length, bucket_size)
  bias = table[:, buckets].transpose(0, 3, 1, 2)
  return constrain(bias, "batch", "act_heads", None, None)


def image_bias(
  table: jax.Array, height: int, width: int, bucket_size: int
) -> jax.Array:
  """Returns the bias of pairs of image tokens on a grid.

  Row and column distances are expanded by products with one-hot arrays. The
  result equals a lookup of all pairs (`positions.image_buckets`), but at 480
  pixels a lookup would gather 810,000 rows, and its gradient would scatter as
  many, which an accelerator does one by one.

  Args:
    table: [G, R, H], a bias for every bucket and head.
    height: h, rows of the grid.
    width: w, columns of the grid.
    bucket_size: largest side of a grid.

  Returns:
    [G, H, h * w, h * w].
  """
  copies, _, heads = table.shape
  side = 2 * bucket_size - 1
  grid = table[:, : side**2].reshape(copies, side, side, heads)
  grid = grid[
    :,
    bucket_size - height : bucket_size + height - 1,
    bucket_size - width : bucket_size + width - 1,
  ]
  expand = functools.partial(
    jnp.einsum,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=table.dtype,
  )
  rows = expand("grch,qkr->ghqkc", grid, _distances(height, table.dtype))
  bias = expand("ghqkc,xyc->ghqxky", rows, _distances(width, table.dtype))
  tokens = height * width
  bias = bias.reshape(copies, heads, tokens, tokens)
  return constrain(bias, "batch", "act_heads", None, None)


def _distances(size: int, dtype: jnp.dtype) -> np.ndarray:
  """One-hot distances [q, k, 2 size - 1]: q - k + size - 1."""
  places = np.arange(size)
  distance = places[:, None] - places[None, :] + size - 1
  return np.eye(2 * size - 1, dtype=dtype)[distance]
