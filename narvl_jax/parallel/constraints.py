"""Sharding constraints of the arrays in a module, by logical axis names.

They have no effect unless the program is traced under `jax.set_mesh` and
`flax.linen.logical_axis_rules(activation_rules(...))`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from narvl_jax.parallel.mesh import BATCH_AXES
from narvl_jax.parallel.rules import partition_spec, resolve


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrains how an activation is split.

  Without it, the compiler may follow the sharding of a weight and gather the
  batch.

  Args:
    x: an array.
    *names: logical axis of every dimension, None if it is not split.
  """
  spec = _resolve(names, x.shape)
  if spec is None:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(spec))


def gathered(
  weight: jax.Array, dtype: Any, *names: str | None, scatter: bool = True
) -> jax.Array:
  """Casts a weight to the compute type, then gathers it over `fsdp`.

  The weight and its gradient are communicated in the compute type. The
  gradient is scattered to where the weight is stored.

  Args:
    weight: float32, as it is stored.
    dtype: dtype of the result.
    *names: logical axis of every dimension. The result stays split over
      `tensor` only.
    scatter: whether the gradient is summed and scattered in one operation.
      Set False for weights that are not multiplied with the batch: lookups,
      and products with positions alone.
  """
  spec = _resolve(names, weight.shape)
  if spec is None:
    return weight.astype(dtype)
  used = [tuple(a for a in axes if a not in BATCH_AXES) for axes in spec]
  return _gather(
    weight,
    jnp.dtype(dtype),
    partition_spec(spec),
    partition_spec(used),
    scatter,
  )


def look_up(
  table: jax.Array, ids: jax.Array, dtype: Any, *names: str | None
) -> jax.Array:
  """Returns rows of a table that is split by columns over `fsdp`.

  Each device looks up its columns for the batches of its `fsdp` group, and
  receives the other columns of its own batch. Neither the table nor its
  gradient is communicated within the group.

  Args:
    table: float32 [V, D], as it is stored.
    ids: int32 [B, T].
    dtype: dtype of the result.
    *names: logical axes of the table.

  Returns:
    [B, T, D].
  """
  spec, table = _resolve(names, table.shape), table.astype(dtype)
  if spec is None:
    return table[ids]
  rows = tuple(axis for axis in BATCH_AXES if axis not in spec[1])
  ids = jax.lax.with_sharding_constraint(ids, partition_spec((rows, ())))
  found = partition_spec((rows, (), spec[1]))
  out = jax.lax.with_sharding_constraint(table[ids], found)
  return constrain(out, "batch", None, None)


def per_device(x: jax.Array, *names: str | None) -> jax.Array:
  """Repeats an array once for every part of the batch.

  The gradient of an array that all examples share is summed over the devices
  where the array is used. With a copy for each part, it is summed here
  instead. Large attention biases then need no communication, only the small
  tables that they are computed from.

  Args:
    x: [...].
    *names: logical axis of every dimension, None if it is not split.

  Returns:
    [G, ...]; G is 1 outside of a mesh.
  """
  mesh: Any = jax.sharding.get_abstract_mesh()
  inside = not mesh.empty and bool(nn.get_logical_axis_rules())
  copies = math.prod(mesh.shape[a] for a in BATCH_AXES) if inside else 1
  x = jnp.broadcast_to(x, (copies, *x.shape))
  return constrain(x, "batch", *names)


def platform() -> str:
  """Returns "cpu", "gpu" or "tpu": what the traced program will run on.

  Under a mesh it is that of its devices, which may be described only, as for
  ahead-of-time compilation; otherwise the default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
  """Returns the kind of device the program will run on, as "TPU v5 lite"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device or jax.devices()[0]).device_kind


def on_shards(
  function: Callable[..., jax.Array],
  inputs: Sequence[tuple[str | None, ...]],
  output: int,
) -> Callable[..., jax.Array]:
  """Runs a function on the part of its arguments on each device.

  The compiler cannot split a kernel that it did not write.

  Args:
    function: function of arrays.
    inputs: logical axes of every argument.
    output: index of the argument whose sharding the result has.
  """

  def local(*arrays: jax.Array) -> jax.Array:
    with nn.logical_axis_rules(()):  # Nothing is split any further.
      return function(*arrays)

  def run(*arrays: jax.Array) -> jax.Array:
    found = [_resolve(n, x.shape) for n, x in zip(inputs, arrays, strict=True)]
    specs = tuple(partition_spec(spec) for spec in found if spec is not None)
    if not specs:
      return function(*arrays)
    return jax.shard_map(
      local, in_specs=specs, out_specs=specs[output], check_vma=False
    )(*arrays)

  return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(
  weight: jax.Array,
  dtype: Any,
  stored: PartitionSpec,
  used: PartitionSpec,
  scatter: bool,
) -> jax.Array:
  del stored, scatter
  return jax.lax.with_sharding_constraint(weight.astype(dtype), used)


def _gather_forward(
  weight: jax.Array, *settings: Any
) -> tuple[jax.Array, None]:
  return _gather(weight, *settings), None


def _gather_backward(
  dtype: Any,
  stored: PartitionSpec,
  used: PartitionSpec,
  scatter: bool,
  _: None,
  gradient: jax.Array,
) -> tuple[jax.Array]:
  del dtype
  if not scatter:
    gradient = jax.lax.with_sharding_constraint(gradient, used)
  gradient = jax.lax.with_sharding_constraint(gradient, stored)
  return (gradient.astype(jnp.float32),)


_gather.defvjp(_gather_forward, _gather_backward)


def _resolve(
  names: tuple[str | None, ...], shape: tuple[int, ...]
) -> tuple[tuple[str, ...], ...] | None:
  """Returns the mesh axes of every dimension.

  None outside of a mesh, and in `on_shards`, whose arrays are parts already.
  """
  mesh: Any = jax.sharding.get_abstract_mesh()
  rules: Any = nn.get_logical_axis_rules()
  if mesh.empty or not rules or mesh.size == 1 or mesh.are_all_axes_manual:
    return None
  known = {name for name, _ in rules}
  # A name without a rule is not split.
  given = tuple(name if name in known else None for name in names)
  spec, _ = resolve(given, shape, mesh.shape, rules)
  return spec
