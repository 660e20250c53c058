"""What modules say of their arrays, so that the compiler moves the right ones.

They have no effect unless the program is traced under `jax.set_mesh` and
`flax.linen.logical_axis_rules(activation_rules(...))`.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from narvl_jax.parallel.mesh import BATCH_AXES
from narvl_jax.parallel.rules import partition_spec, resolve


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Says how an activation is split.

  Without it the compiler may follow the sharding of a weight and gather the
  batch.

  Args:
    x: an array.
    *names: logical axis of every dimension, None for one that is whole.
  """
  spec = _resolve(names, x.shape)
  if spec is None:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(spec))


def gathered(
  weight: jax.Array, dtype: Any, *names: str | None, scatter: bool = True
) -> jax.Array:
  """Casts a weight to the compute type and gathers it where it is used.

  What travels is of that type: the weight on its way here, and its gradient,
  which is scattered to where the weight is stored.

  Args:
    weight: as it is stored, float32.
    dtype: of the result.
    *names: logical axes by which it is stored, one for every dimension. The
      result stays split over `tensor` only.
    scatter: whether the gradient is summed and scattered at once. False where
      that would split what is not a product with the batch: lookups, and
      what is computed of positions alone.
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


def per_device(x: jax.Array, *names: str | None) -> jax.Array:
  """Repeats an array once for every part of the batch.

  The gradient of what all examples share is summed over the devices as soon
  as it is computed. With a copy each, the sum waits until here; so an
  attention bias, which is large, costs no communication, only the small
  tables that it is made of.

  Args:
    x: [...].
    *names: logical axis of every dimension, None for one that is whole.

  Returns:
    [G, ...]; G is 1 outside of a mesh.
  """
  mesh: Any = jax.sharding.get_abstract_mesh()
  inside = not mesh.empty and bool(nn.get_logical_axis_rules())
  copies = math.prod(mesh.shape[a] for a in BATCH_AXES) if inside else 1
  x = jnp.broadcast_to(x, (copies, *x.shape))
  return constrain(x, "batch", *names)


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
  """Returns the mesh axes of every dimension, None outside of a mesh."""
  mesh: Any = jax.sharding.get_abstract_mesh()
  rules: Any = nn.get_logical_axis_rules()
  if mesh.empty or not rules or mesh.size == 1:
    return None
  known = {name for name, _ in rules}
  # Where rules leave a name out, what bears it is not split.
  given = tuple(name if name in known else None for name in names)
  spec, _ = resolve(given, shape, mesh.shape, rules)
  return spec
