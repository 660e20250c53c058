"""Shardings of parameters and batches, and the table that explains them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import flax.traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from narvl_jax.errors import UserError
from narvl_jax.parallel.mesh import (
  BATCH_AXES,
  MeshShape,
  data_parallel_size,
  format_shape,
)
from narvl_jax.parallel.placement import Placement, place
from narvl_jax.parallel.rules import DEFAULT_RULES, axes_of, partition_spec
from narvl_jax.terminal.tables import format_columns


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that is whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose leading axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def fitting_sharding(
  sharding: NamedSharding, shape: Sequence[int]
) -> NamedSharding:
  """Returns a sharding without the mesh axes that do not divide a shape.

  Args:
    sharding: sharding of an array with other sizes.
    shape: shape of the array to place, with as many dimensions.
  """
  spec: list[tuple[str, ...]] = []
  for size, axes in zip(shape, sharding.spec, strict=False):
    kept: list[str] = []
    for axis in axes_of(axes):
      if size % math.prod(sharding.mesh.shape[a] for a in [*kept, axis]) == 0:
        kept.append(axis)
    spec.append(tuple(kept))
  return NamedSharding(sharding.mesh, partition_spec(spec))


def tree_shardings(
  boxed: Any, mesh: Mesh, rules: Iterable[Any] = DEFAULT_RULES
) -> Any:
  """Returns the `NamedSharding` of every leaf of a tree.

  Args:
    boxed: nested dicts of shapes of variables, boxed with
      `nn.with_logical_partitioning` or not; unboxed leaves are replicated.
    mesh: the device mesh.
    rules: see `narvl_jax.parallel.rules`.

  Raises:
    UserError: the rules do not fit, see `place`.
  """
  return flax.traverse_util.unflatten_dict(
    {
      placement.path: NamedSharding(mesh, placement.partition_spec)
      for placement in place(boxed, mesh.shape, rules)
    },
    sep="/",
  )


def sharding_table(
  placements: Sequence[Placement],
  mesh_shape: MeshShape,
  rules: Iterable[Any],
) -> str:
  """Returns a text with the placement of every array, and sums of bytes.

  Args:
    placements: placements of all variables.
    mesh_shape: axis -> size.
    rules: the rules of the placements.
  """
  rows = [
    ("array", "shape", "axes", "split over", "a device", "bytes a device")
  ]
  total = on_device = whole = 0
  for p in placements:
    parts = p.parts(mesh_shape)
    total += p.bytes
    on_device += p.bytes // parts
    whole += p.bytes if parts == 1 else 0
    split = [_join(axes, "+") for axes in p.spec]
    rows.append(
      (
        p.path,
        _join(p.shape, "x") or "scalar",
        _join((name or "-" for name in p.names), ","),
        _join((s or "-" for s in split), ",") if any(split) else "whole",
        _join(p.shard_shape(mesh_shape), "x") or "scalar",
        f"{p.bytes // parts:,}",
      )
    )
  lines = [f"mesh {format_shape(mesh_shape)}", "rules, first to last:"]
  lines += [f"  {name} -> {_shown(axes)}" for name, axes in rules]
  lines.append(format_columns(rows, left=5, rule=False))
  lines.append(
    f"sum {total:,} bytes; {on_device:,} a device; {whole:,}"
    f" ({100 * whole / max(total, 1):.2f} %) whole on every device"
  )
  return "\n".join(lines)


def _join(parts: Iterable[Any], by: str) -> str:
  return by.join(map(str, parts))


def _shown(axes: Any) -> str:
  if axes is None:
    return "whole"
  return axes if isinstance(axes, str) else _join(axes, "+")


def check_batch_size(
  batch_size: int, mesh: Mesh, *, accumulation_steps: int = 1
) -> None:
  """Checks that every device gets the same rows of every micro-batch.

  Raises:
    UserError: the size does not divide; the error names the nearest valid ones.
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
  nearer_above = below <= 0 or 2 * (batch_size - below) > parts
  nearest = max(below, 0) + (parts if nearer_above else 0)
  split = f"{data_parallel_size(mesh)} device(s)"
  if mesh.shape["tensor"] > 1:
    split = f"data x fsdp = {data_parallel_size(mesh)}"
  if accumulation_steps > 1:
    split += f" x {accumulation_steps} accumulation steps"
  raise UserError(
    f"train.batch_size={batch_size} is not divisible by {split}; nearest"
    f" valid: {near}: --config.train.batch_size={nearest}"
  )
