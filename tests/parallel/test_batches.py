"""Rows of a batch on the hosts that need them."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from narvl_jax.parallel import (
  batch_sharding,
  batches,
  local_rows,
  local_values,
  make_mesh,
  shard_batch,
)


@pytest.mark.parametrize("rows_given", [False, True])
def test_batches_are_split_along_their_first_axis(rows_given):
  mesh = make_mesh(4)
  values = np.arange(24).reshape(8, 3)
  batch = shard_batch({"x": values}, mesh, 8 if rows_given else None)
  assert batch["x"].sharding == batch_sharding(mesh)
  for i, shard in enumerate(batch["x"].addressable_shards):
    np.testing.assert_array_equal(shard.data, values[2 * i : 2 * i + 2])
  rows = local_rows(mesh, 8)
  assert rows == list(range(8))
  np.testing.assert_array_equal(local_values(batch["x"], rows), values)


class OtherHosts:
  """A batch sharding of which some devices belong to other hosts."""

  is_fully_addressable = False

  def __init__(self, mesh: Any, own: list[int]) -> None:
    self._whole = batch_sharding(mesh)
    self._own = own

  def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> Any:
    parts = self._whole.devices_indices_map(shape)
    return {d: i for d, i in parts.items() if d.id in self._own}


@pytest.mark.parametrize(
  ("shape", "own", "rows"),
  [
    # Neighbours, a torus of hosts, and a tensor axis across hosts.
    ((8, 1, 1), [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]),
    ((4, 2, 1), [0, 1, 4, 5], [0, 1, 2, 3, 8, 9, 10, 11]),
    ((2, 2, 2), [0, 2], [0, 1, 2, 3, 4, 5, 6, 7]),
    ((2, 2, 2), [1, 3], [0, 1, 2, 3, 4, 5, 6, 7]),
    ((1, 1, 8), [5], list(range(16))),
  ],
)
def test_a_host_makes_the_rows_of_its_devices(monkeypatch, shape, own, rows):
  mesh = make_mesh(*shape)
  # The ids of fake devices are their places in the mesh.
  assert [d.id for d in mesh.devices.flat] == list(range(8))
  sharding = OtherHosts(mesh, own)
  monkeypatch.setattr(batches, "batch_sharding", lambda _: sharding)
  assert local_rows(mesh, 16) == rows
  made = []

  def make(shape: Any, given: NamedSharding, part: Any) -> None:
    assert given is sharding
    assert shape == (16, 2)
    for index in sharding.addressable_devices_indices_map((16,)).values():
      made.append((index[0], part((index[0], slice(None)))))

  monkeypatch.setattr(jax, "make_array_from_callback", make)
  whole = np.arange(32).reshape(16, 2)
  shard_batch({"x": whole[rows]}, mesh, 16)
  assert len(made) == len(own)
  for index, values in made:
    np.testing.assert_array_equal(values, whole[index])
  # And back: the shards of this host give its rows.
  shards = [SimpleNamespace(index=(i, slice(None)), data=x) for i, x in made]
  array: Any = SimpleNamespace(
    shape=(16, 2), dtype=whole.dtype, addressable_shards=shards
  )
  array = type("Fake", (), {**vars(array), "__len__": lambda _: 16})()
  np.testing.assert_array_equal(local_values(array, rows), whole[rows])
