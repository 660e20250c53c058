"""Attention biases that depend on the distance of two positions only.

All of them begin with an axis of copies (`per_device`), one for each part of
the batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.models import positions
from narvl_jax.parallel.constraints import constrain


def token_bias(table: jax.Array, length: int, bucket_size: int) -> jax.Array:
  """Looks the distances of tokens up.

  Args:
    table: [G, R, H], a bias for every bucket and head.
    length: T.
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
  """Looks the distances of the tokens of a grid up.

  The distance along rows and the one along columns are expanded by a product
  with zeros and ones each, which gives the same numbers as looking up all
  pairs (`positions.image_buckets`). There are (h w)^2 of these: 810,000 rows
  of a table at 480 pixels, and as many to scatter the gradient to, which an
  accelerator does one by one.

  Args:
    table: [G, R, H], a bias for every bucket and head.
    height: of the grid, h.
    width: of the grid, w.
    bucket_size: n, the largest side of a grid.

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
