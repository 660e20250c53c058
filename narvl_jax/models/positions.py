"""Relative position buckets and image position ids of the reference."""

import functools
import math

import numpy as np


@functools.lru_cache(maxsize=64)
def token_buckets(
  length: int, bucket_size: int = 256, max_position: int = 1024
) -> np.ndarray:
  """Buckets of relative token distances, int32 [query, key].

  Distances up to half the bucket size have one bucket each; larger ones share
  buckets whose size grows logarithmically. Values lie in
  0 .. 2 * bucket_size - 2.
  """
  distance = np.arange(length)[:, None] - np.arange(length)[None, :]
  exact = bucket_size // 2
  magnitude = np.abs(distance)
  log_part = np.ceil(
    np.log(np.maximum(magnitude, 1) / exact)
    / math.log((max_position - 1) / exact)
    * (exact - 1)
  )
  # Distances of `max_position` and more share the last bucket.
  log_part = np.minimum(log_part, exact - 1)
  far = np.sign(distance) * (log_part.astype(np.int64) + exact)
  near_or_far = np.where(magnitude <= exact, distance, far)
  return (near_or_far + bucket_size - 1).astype(np.int32)


@functools.lru_cache(maxsize=64)
def image_position_ids(
  height: int, width: int, bucket_size: int = 42
) -> np.ndarray:
  """Ids 1 + column + bucket_size * row of a token grid, int32 [h * w]."""
  rows, columns = np.divmod(np.arange(height * width), width)
  return (1 + columns + bucket_size * rows).astype(np.int32)


@functools.lru_cache(maxsize=64)
def image_buckets(height: int, width: int, bucket_size: int = 42) -> np.ndarray:
  """Buckets of relative image positions, int32 [h * w, h * w].

  bucket = (row_q - row_k + n - 1) * (2 n - 1) + (column_q - column_k + n - 1)
  with n = bucket_size. The last three rows of the table belong to a special
  id 0, which only image generation uses.
  """
  rows, columns = np.divmod(np.arange(height * width), width)
  side = 2 * bucket_size - 1
  row = rows[:, None] - rows[None, :] + bucket_size - 1
  column = columns[:, None] - columns[None, :] + bucket_size - 1
  return (row * side + column).astype(np.int32)


def num_token_buckets(bucket_size: int) -> int:
  """Rows of a relative token table."""
  return 2 * bucket_size - 1


def num_image_buckets(bucket_size: int) -> int:
  """Rows of a relative image table, the three unused ones included."""
  return (2 * bucket_size - 1) ** 2 + 3


def num_image_positions(bucket_size: int) -> int:
  """Rows of the absolute image position table; row 0 is never used."""
  return bucket_size**2 + 1


def sinusoids(count: int, width: int) -> np.ndarray:
  """Returns sines and cosines of the positions, float32 [count, width].

  Wavelengths grow geometrically from four positions to twice the count:
  neighbours are similar, and all positions differ.
  """
  half = (width + 1) // 2
  wavelength = np.geomspace(4.0, max(2.0 * count, 8.0), half)
  angle = 2 * np.pi * np.arange(count)[:, None] / wavelength
  table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
  return table[:, :width].astype(np.float32)


def image_sinusoids(bucket_size: int, width: int) -> np.ndarray:
  """Returns an image position table made of `sinusoids` of row and column.

  Returns:
    float32 [bucket_size ** 2 + 1, width]. Row 0 is zero. In the others, one
    half encodes the row of the grid and the other half the column.
  """
  rows, columns = np.divmod(np.arange(bucket_size**2), bucket_size)
  vertical = sinusoids(bucket_size, width // 2)[rows]
  horizontal = sinusoids(bucket_size, width - width // 2)[columns]
  grid = np.concatenate([vertical, horizontal], axis=1)
  return np.concatenate([np.zeros((1, width), np.float32), grid])
