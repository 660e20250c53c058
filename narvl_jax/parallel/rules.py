"""Rules that place parameters: logical axis names to mesh axes.

A rule is a pair (logical axis name, mesh axis or None). Rules are tried from
first to last. A rule applies to a dimension of its name if no earlier rule
did, if no other dimension of the array uses its mesh axis, and if the size of
the mesh axis divides the dimension. A later rule of the same name is therefore
a fallback. A dimension with a name to which no rule applies is an error, so
that nothing is replicated silently.
"""

import difflib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.parallel.mesh import (
  AXES,
  BATCH_AXES,
  MeshShape,
)

# (logical axis name, mesh axis or axes, None for none)
Rule = tuple[str, str | tuple[str, ...] | None]

DEFAULT_RULES: tuple[Rule, ...] = (
  # Parameters.
  ("vocab", "tensor"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("embed", "fsdp"),
  # Whole if `embed` uses the axis already, or if the size does not divide.
  ("conv_out", "fsdp"),
  ("conv_out", None),
  ("conv_in", None),
  ("conv_height", None),
  ("conv_width", None),
  ("head_width", None),
  ("norm", None),
  ("layers", None),
  # Activations.
  ("act_heads", "tensor"),
  ("act_mlp", "tensor"),
  ("act_embed", None),
)

# Names of activations in the modules, besides "batch".
ACTIVATION_AXES = ("act_heads", "act_mlp", "act_embed")


def partition_spec(spec: Iterable[tuple[str, ...]]) -> PartitionSpec:
  """Returns the mesh axes of every dimension as a `PartitionSpec`."""
  return PartitionSpec(
    *(axes if len(axes) > 1 else (axes or (None,))[0] for axes in spec)
  )


class NoRuleError(Exception):
  """No rule applies to a dimension."""


def check_rules(rules: Iterable[Any]) -> tuple[Rule, ...]:
  """Returns the rules as tuples.

  Raises:
    UserError: an entry is not a rule, or names a mesh axis that does not exist.
  """
  checked = []
  for rule in rules:
    if (
      not isinstance(rule, Sequence)
      or isinstance(rule, str)
      or len(rule) != 2
      or not isinstance(rule[0], str)
    ):
      raise UserError(
        f"mesh.rules: {rule!r} is not a pair (logical axis name, mesh axis or"
        ' None) such as ("embed", "fsdp")'
      )
    name, axes = rule
    if not isinstance(axes, (str, tuple, list, type(None))):
      raise UserError(
        f'mesh.rules: ("{name}", {axes!r}) names no mesh axis, such as'
        f' ("{name}", "fsdp"), and not None'
      )
    for axis in axes_of(axes):
      if axis not in AXES:
        raise UserError(
          f'mesh.rules: ("{name}", {axes!r}) names the mesh axis "{axis}".'
          f"{did_you_mean(str(axis), AXES)}"
        )
    if name == "batch":
      raise UserError(
        'mesh.rules: "batch" is always split over'
        f" {' and '.join(BATCH_AXES)}; remove its rule"
      )
    checked.append((name, tuple(axes) if isinstance(axes, list) else axes))
  return tuple(checked)


def activation_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
  """Returns what `flax.linen.logical_axis_rules` needs for the modules."""
  return (("batch", BATCH_AXES), *rules)


def resolve(
  names: tuple[str | None, ...],
  shape: tuple[int, ...],
  mesh_shape: MeshShape,
  rules: tuple[Rule, ...],
) -> tuple[tuple[tuple[str, ...], ...], set[int]]:
  """Applies the rules to one array.

  Args:
    names: logical name of every dimension, None if it is not split.
    shape: shape of the array.
    mesh_shape: axis -> size.
    rules: see the module.

  Returns:
    The mesh axes of every dimension, and the indices of the rules that applied.

  Raises:
    NoRuleError: a dimension has a name and no rule applies.
  """
  spec: list[tuple[str, ...] | None] = [None if name else () for name in names]
  used: set[int] = set()
  for index, (rule_name, rule_axes) in enumerate(rules):
    axes = axes_of(rule_axes)
    for dim, name in enumerate(names):
      taken = set(itertools.chain.from_iterable(a for a in spec if a))
      if spec[dim] is not None or name != rule_name or taken & set(axes):
        continue
      if shape[dim] % math.prod(mesh_shape[axis] for axis in axes) == 0:
        spec[dim] = axes
        used.add(index)
  for dim, axes in enumerate(spec):
    if axes is None:
      raise NoRuleError(_why(dim, names, shape, mesh_shape, rules))
  return tuple(axes or () for axes in spec), used


def _why(
  dim: int,
  names: tuple[str | None, ...],
  shape: tuple[int, ...],
  mesh_shape: MeshShape,
  rules: tuple[Rule, ...],
) -> str:
  """Explains why no rule applies to a dimension."""
  name = str(names[dim])
  own = [rule for rule in rules if rule[0] == name]
  if not own:
    near = difflib.get_close_matches(name, {rule[0] for rule in rules}, n=1)
    similar = f', only for "{near[0]}"' if near else ""
    return (
      f'no rule for the axis "{name}"{similar}. Add ("{name}", None) to'
      " mesh.rules to leave it whole"
    )
  _, rule_axes = own[-1]
  axes = axes_of(rule_axes)
  size = math.prod(mesh_shape[axis] for axis in axes)
  shown = f'the rule ("{name}", {rule_axes!r})'
  if shape[dim] % size:
    sizes = ", ".join(f"{axis}={mesh_shape[axis]}" for axis in axes)
    text = f'{shown} splits the axis "{name}" of {shape[dim]}, which does not'
    text += f" divide by {sizes}"
    if name == "vocab":
      text += f" (--config.model.vocab_multiple={math.lcm(128, size)} pads it)"
    return text
  return (
    f"{shown} uses a mesh axis that another axis of this array has already;"
    f' add ("{name}", None) after it'
  )


def axes_of(axes: Any) -> tuple[str, ...]:
  """Returns the mesh axes of a rule as a tuple, () for None."""
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(axes)
