"""Attention biases that depend only on the distance between two positions.

Tables and biases have a leading axis G of copies, one for each part of the
batch (`parallel.constraints.per_device`).
"""

import jax
import jax.numpy as jnp

from narvl_jax.kernels import relative_bias as kernels
from narvl_jax.models import positions
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.parallel.constraints import constrain, on_shards, platform


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

  It is made of slices. At 480 pixels a lookup of all pairs
  (`positions.image_buckets`) would gather 810,000 rows, and its gradient would
  scatter as many, which an accelerator does one by one.

  Args:
    table: [G, R, H], a bias for every bucket and head.
    height: h, rows of the grid.
    width: w, columns of the grid.
    bucket_size: largest side of a grid.

  Returns:
    [G, H, h * w, h * w].
  """
  rows = image_rows(table, height, width, bucket_size)
  bias = jnp.concatenate(
    [
      rows[..., start * width : (start + height) * width]
      for start in reversed(range(height))
    ],
    axis=2,
  )
  return constrain(bias, "batch", "act_heads", None, None)


def image_rows(
  table: jax.Array, height: int, width: int, bucket_size: int
) -> jax.Array:
  """Returns the distinct rows of `image_bias`, for one row of queries.

  Returns:
    [G, H, w, (2 h - 1) * w]: query column, row of the key minus that of the
    query, ascending, and key column.
  """
  copies, _, heads = table.shape
  n, side = bucket_size, 2 * bucket_size - 1
  grid = table[:, : side**2].reshape(copies, side, side, heads)
  # Distances of the key from the query, ascending.
  grid = grid[:, n - height : n + height - 1, n - width : n + width - 1]
  grid = grid[:, ::-1, ::-1].transpose(0, 3, 1, 2)
  rows = jnp.stack(
    [grid[..., start : start + width] for start in reversed(range(width))],
    axis=2,
  )
  return rows.reshape(copies, heads, width, -1)


def add_relative(
  bias: jax.Array,
  image_table: jax.Array,
  text_table: jax.Array,
  grid: tuple[int, int],
  config: ModelConfig,
) -> jax.Array:
  """Adds the relative biases of image and text to a bias [G, H, S, S].

  Args:
    bias: of image tokens, then text tokens.
    image_table: [G, R, H].
    text_table: [G, R, H].
    grid: (height, width) of the image in tokens.
    config: the architecture.
  """
  split = grid[0] * grid[1]
  text = token_bias(text_table, bias.shape[2] - split, config.token_bucket_size)
  if config.attention_method == "pallas" and kernels.fits(bias):
    rows = image_rows(image_table, *grid, config.image_bucket_size)
    pairs = ("batch", "act_heads", None, None)
    interpret = platform() != "tpu"

    def add(bias: jax.Array, rows: jax.Array, text: jax.Array) -> jax.Array:
      out = kernels.add_relative(bias[0], rows[0], text[0], interpret)
      return jnp.asarray(out)[None]

    return on_shards(add, (pairs, pairs, pairs), 0)(bias, rows, text)
  image = image_bias(image_table, *grid, config.image_bucket_size)
  bias = bias.at[:, :, :split, :split].add(image)
  return bias.at[:, :, split:, split:].add(text)
