"""Where arrays live: logical axis names to mesh axes, batches to devices."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from narvl_jax.errors import UserError
from narvl_jax.parallel.mesh import data_parallel_size

# Logical axis name -> mesh axes. Names that are absent are replicated, so a
# parameter is split only where a rule says so.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ("batch", ("data", "fsdp")),
)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose leading axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def tree_shardings(abstract: Any, mesh: Mesh) -> Any:
  """Maps a tree with logical axis names to one of `NamedSharding`s.

  Args:
    abstract: shapes of variables, boxed with `nn.with_logical_partitioning`
      or not; unboxed leaves are replicated.
    mesh: the device mesh.

  Returns:
    The tree of `abstract`, unboxed, with a `NamedSharding` at every leaf.
  """
  return nn.logical_to_mesh_sharding(
    nn.get_partition_spec(abstract), mesh, list(RULES)
  )


def check_batch_size(
  batch_size: int, mesh: Mesh, *, accumulation_steps: int = 1
) -> None:
  """Checks that every device gets the same rows of every micro-batch.

  Raises:
    UserError: naming the nearest batch sizes that divide.
  """
  if accumulation_steps < 1:
    raise UserError(
      f"train.accumulation_steps={accumulation_steps} is below 1:"
      " --config.train.accumulation_steps=1"
    )
  parts = data_parallel_size(mesh) * accumulation_steps
  if batch_size > 0 and batch_size % parts == 0:
    return
  below = batch_size // parts * parts
  near = f"{below} or {below + parts}" if below > 0 else f"{parts}"
  split = f"{data_parallel_size(mesh)} device(s)"
  if accumulation_steps > 1:
    split += f" x {accumulation_steps} accumulation steps"
  raise UserError(
    f"train.batch_size={batch_size} is not divisible by {split}; nearest"
    f" valid: {near}: --config.train.batch_size={below or parts}"
  )


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Places host arrays on the mesh, split along the leading axis.

  Args:
    batch: arrays [B, ...]; B must divide by the data-parallel size.
    mesh: the device mesh.
  """
  return jax.device_put(dict(batch), batch_sharding(mesh))
