"""Converts image position tables between picture sizes and table sizes.

Positions and relative distances that were learned on the token grid of one
picture size are stretched to the grid of another by bicubic interpolation.
Tables of another `image_bucket_size` keep the entries that both can hold.
"""

import functools
import math

import jax
import jax.numpy as jnp

# Rows of a relative table that belong to no pair of the grid.
_EXTRA_BUCKETS = 3

# Rows and columns.
Grid = tuple[int, int]


def positions_side(rows: int) -> int | None:
  """Returns the grid side of a position table, None if it is another array."""
  side = math.isqrt(max(rows - 1, 0))
  return side if side and side**2 + 1 == rows else None


def distances_side(rows: int) -> int | None:
  """Returns the grid side of a relative table, None if it is another array."""
  double = math.isqrt(max(rows - _EXTRA_BUCKETS, 0))
  if double % 2 == 0 or double**2 + _EXTRA_BUCKETS != rows:
    return None
  return (double + 1) // 2


@functools.partial(jax.jit, static_argnames=("old", "new"))
def resize_positions(
  table: jax.Array, fresh: jax.Array, old: Grid, new: Grid
) -> jax.Array:
  """Converts a table of absolute image positions.

  Args:
    table: [n ** 2 + 1, D], learned on the grid `old`.
    fresh: [m ** 2 + 1, D], initial values of the new table.
    old: at most n rows and columns.
    new: at most m rows and columns.

  Returns:
    [m ** 2 + 1, D]. On the grid `new` it contains the stretched entries of
    `old`, elsewhere those of `table` where that has them, otherwise those of
    `fresh`.
  """
  n, m = positions_side(table.shape[0]), positions_side(fresh.shape[0])
  assert n is not None
  assert m is not None
  both = min(n, m)
  theirs = table[1:].reshape(n, n, -1)
  grid = fresh[1:].reshape(m, m, -1).astype(table.dtype)
  grid = grid.at[:both, :both].set(theirs[:both, :both])
  if old != new:
    stretched = stretch(theirs[: old[0], : old[1]], new)
    grid = grid.at[: new[0], : new[1]].set(stretched)
  return jnp.concatenate([table[:1], grid.reshape(m**2, -1)])


@functools.partial(jax.jit, static_argnames=("old", "new"))
def resize_distances(
  table: jax.Array, fresh: jax.Array, old: Grid, new: Grid
) -> jax.Array:
  """Converts a table of relative image positions.

  Args:
    table: [(2 n - 1) ** 2 + 3, H], learned on the grid `old`.
    fresh: [(2 m - 1) ** 2 + 3, H], initial values of the new table.
    old: at most n rows and columns.
    new: at most m rows and columns.

  Returns:
    [(2 m - 1) ** 2 + 3, H]. Distances up to `old` - 1 are stretched to
    `new` - 1. Longer ones are taken from `table` where that has them,
    otherwise from `fresh`.
  """
  n, m = distances_side(table.shape[0]), distances_side(fresh.shape[0])
  assert n is not None
  assert m is not None

  def centre(grid: jax.Array, reach: Grid) -> tuple[slice, slice]:
    rows, columns = (
      slice(size // 2 - r + 1, size // 2 + r)
      for size, r in zip(grid.shape[:2], reach, strict=True)
    )
    return rows, columns

  both = (min(n, m), min(n, m))
  theirs = table[:-_EXTRA_BUCKETS].reshape(2 * n - 1, 2 * n - 1, -1)
  grid = fresh[:-_EXTRA_BUCKETS].reshape(2 * m - 1, 2 * m - 1, -1)
  grid = grid.astype(table.dtype)
  grid = grid.at[centre(grid, both)].set(theirs[centre(theirs, both)])
  if old != new:
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    stretched = stretch(theirs[centre(theirs, old)], size)
    grid = grid.at[centre(grid, new)].set(stretched)
  flat = grid.reshape((2 * m - 1) ** 2, -1)
  return jnp.concatenate([flat, table[-_EXTRA_BUCKETS:]])


@functools.partial(jax.jit, static_argnames="size")
def stretch(grid: jax.Array, size: Grid) -> jax.Array:
  """Resizes [h, w, C] to [*size, C], bicubic, with corners aligned."""
  scales, shifts = [], []
  for before, after in zip(grid.shape[:2], size, strict=True):
    if after == 1:
      # A single output takes the centre: it cannot be aligned with corners.
      scale, shift = 1.0, -0.5 * (before - 1)
    elif before == 1:
      scale, shift = float(after), 0.0
    else:
      scale = (after - 1) / (before - 1)
      shift = 0.5 - 0.5 * scale
    scales.append(scale)
    shifts.append(shift)
  resized = jax.image.scale_and_translate(
    grid.astype(jnp.float32),
    (*size, grid.shape[2]),
    (0, 1),
    jnp.array(scales, jnp.float32),
    jnp.array(shifts, jnp.float32),
    method="cubic",
  )
  return resized.astype(grid.dtype)
