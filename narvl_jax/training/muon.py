"""Muon's orthogonalisation, divided over the devices of a mesh.

The momentum of a parameter is split over `fsdp` within its matrices. Every
device would need whole matrices, and all would repeat the same iterations.
Instead matrices of one shape are stacked, and each device gets whole matrices
of the stack.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from optax import contrib
from optax.contrib import MuonDimensionNumbers

from narvl_jax.parallel import AXES, WIDTH_AXIS
from narvl_jax.state.parameters import flatten

# Muon's updates times this have the size of AdamW's (arXiv 2502.16982).
_RMS = 0.2
# Of Jordan (2024), https://kellerjordan.github.io/posts/muon/.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def muon(
  matrices: Mapping[str, MuonDimensionNumbers],
  *,
  eps: float,
  b1: float,
  b2: float,
) -> optax.GradientTransformation:
  """Returns `optax.contrib.muon` without a learning rate.

  The state is the same.

  Args:
    matrices: axes of the parameters that Muon updates; see `matrix_axes`. Adam
      updates all others.
    eps: added to norms, and to the root of Adam's second moment.
    b1: decay of Adam's first moment.
    b2: decay of Adam's second moment.
  """

  def axes_of(params: Any) -> Any:
    axes = {path: matrices.get(path) for path in flatten(params)}
    return flax.traverse_util.unflatten_dict(axes, sep="/")

  # Muon scales by minus its learning rate. Without steps its updates are
  # momenta of norm `scale`, see `_newton_schulz`.
  momentum = contrib.muon(
    -1.0,
    ns_steps=0,
    eps=eps,
    adam_b1=b1,
    adam_b2=b2,
    consistent_rms=_RMS,
    muon_weight_dimension_numbers=axes_of,
  )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = momentum.update(updates, state, params)
    flat = flatten(updates)
    found = {path: x for path, x in flat.items() if path in matrices}
    flat |= _orthogonalize(found, matrices)
    return flax.traverse_util.unflatten_dict(flat, sep="/"), state

  return optax.GradientTransformation(momentum.init, update)


def _orthogonalize(
  momenta: Mapping[str, jax.Array], axes: Mapping[str, MuonDimensionNumbers]
) -> dict[str, jax.Array]:
  """Returns the updates of all matrices."""
  groups: collections.defaultdict[Any, dict[str, jax.Array]]
  groups = collections.defaultdict(dict)
  for path, x in momenta.items():
    x = _stack(x, axes[path])
    groups[x.shape[1:]][path] = x
  updates = {}
  for members in groups.values():
    found = _on_devices(jnp.concatenate(list(members.values())))
    start = 0
    for path, x in members.items():
      part = found[start : start + len(x)]
      updates[path] = _unstack(part, momenta[path].shape, axes[path])
      start += len(x)
  return updates


def _stack(x: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
  """Returns the matrices [N, I, O] of a parameter."""
  inner, shape = _last(x.shape, axes)
  x = jnp.moveaxis(x, inner, range(-len(inner), 0))
  return x.reshape(-1, *shape)


def _unstack(
  x: jax.Array, shape: tuple[int, ...], axes: MuonDimensionNumbers
) -> jax.Array:
  """Returns the parameter of `shape` with matrices [N, I, O]."""
  inner, _ = _last(shape, axes)
  outer = [i for i in range(len(shape)) if i not in inner]
  x = x.reshape([shape[i] for i in (*outer, *inner)])
  return jnp.moveaxis(x, range(-len(inner), 0), inner)


def _last(
  shape: tuple[int, ...], axes: MuonDimensionNumbers
) -> tuple[tuple[int, ...], tuple[int, int]]:
  """Returns the axes within matrices, and the shape of a matrix."""
  inputs, outputs = (tuple(a) for a in axes)  # pyright: ignore
  rows, columns = (math.prod(shape[i] for i in a) for a in (inputs, outputs))
  return inputs + outputs, (rows, columns)


def _on_devices(x: jax.Array) -> jax.Array:
  """Returns the updates of matrices [N, I, O], each made on one device."""
  mesh: Any = jax.sharding.get_abstract_mesh()
  count = len(x)
  # Each device communicates its part of every matrix over `fsdp`, in one
  # all-to-all; the further axes only select.
  specs = [PartitionSpec(None, WIDTH_AXIS), PartitionSpec(WIDTH_AXIS)]
  others = [axis for axis in AXES if axis != WIDTH_AXIS]
  specs.append(PartitionSpec((WIDTH_AXIS, *others)))
  if mesh.size > 1:
    x = jnp.pad(x, ((0, -count % mesh.size), (0, 0), (0, 0)))
    for spec in specs:
      x = jax.lax.with_sharding_constraint(x, spec)
  x = _newton_schulz(x)
  if mesh.size > 1:
    for spec in reversed(specs):
      x = jax.lax.with_sharding_constraint(x, spec)
  return x[:count]


def _newton_schulz(x: jax.Array) -> jax.Array:
  """Orthogonalises momenta [N, I, O] of norm `scale`, and scales them."""
  scale = _RMS * math.sqrt(max(x.shape[1:]))
  wide = x.shape[1] <= x.shape[2]
  a, b, c = _COEFFICIENTS
  x = (x if wide else x.mT) / scale
  for _ in range(_STEPS):
    squares = x @ x.mT
    x = a * x + (b * squares + c * squares @ squares) @ x
  return (x if wide else x.mT) * scale
