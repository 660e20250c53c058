"""Batches on several hosts: each creates only the rows of its devices."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from narvl_jax.parallel.sharding import batch_sharding


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """Returns the rows of a global batch that the devices of this host need.

  Hosts need the same rows if the tensor axis runs across them. The rows of a
  host need not be contiguous.

  Args:
    mesh: the device mesh.
    batch_size: rows of all hosts; divisible by the data-parallel size.

  Returns:
    R row numbers in ascending order.
  """
  shape = (batch_size,)
  indices = batch_sharding(mesh).addressable_devices_indices_map(shape)
  parts = {
    index[0].indices(batch_size)[:2]
    for index in indices.values()
    if index is not None
  }
  return list(itertools.chain(*(range(*part) for part in sorted(parts))))


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
  """Places host arrays on the mesh, split along the leading axis.

  Args:
    batch: arrays [R, ...], the rows that `local_rows` returns.
    mesh: the device mesh.
    batch_size: B, rows of all hosts; may be None on a single host.

  Returns:
    Arrays [B, ...]; B must be divisible by the data-parallel size.
  """
  sharding = batch_sharding(mesh)
  if sharding.is_fully_addressable:
    return jax.device_put(dict(batch), sharding)
  assert batch_size is not None
  rows = local_rows(mesh, batch_size)

  def place(array: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      return array[_positions(rows, index[0], batch_size)]

    shape = (batch_size, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return {name: place(array) for name, array in batch.items()}


def local_values(array: jax.Array, rows: Sequence[int]) -> np.ndarray:
  """Fetches the rows of a batch that the devices of this host hold.

  Args:
    array: [B, ...], split by `batch_sharding`.
    rows: result of `local_rows`.

  Returns:
    [R, ...].
  """
  values = np.empty((len(rows), *array.shape[1:]), array.dtype)
  for shard in array.addressable_shards:
    place = _positions(rows, shard.index[0], len(array))
    values[place] = np.asarray(shard.data)
  return values


def _positions(rows: Sequence[int], part: slice, batch_size: int) -> slice:
  """Returns the position of global rows among those of this host."""
  start, stop, _ = part.indices(batch_size)
  first = bisect.bisect_left(rows, start)
  return slice(first, first + stop - start)
