"""Rules that place parameters: logical axis names to mesh axes.

A rule is a pair (logical axis name, mesh axis or None). Rules are tried from
the first to the last. A rule applies to a dimension of its name if no earlier
one has, if its mesh axis is still free in the array, and if the size of the
mesh axis divides the dimension; so a second rule of a name is what happens
where the first cannot apply. A dimension that is left without a rule is an
error: nothing is replicated in silence.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
from flax.linen import meta
from jax.sharding import PartitionSpec

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.parallel.mesh import (
  AXES,
  BATCH_AXES,
  MeshShape,
  format_shape,
  nearest_shape,
  shapes_of,
)

# (logical axis name, mesh axis or axes, None for none)
Rule = tuple[str, str | tuple[str, ...] | None]

DEFAULT_RULES: tuple[Rule, ...] = (
  # Parameters.
  ("vocab", "tensor"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("embed", "fsdp"),
  # But where the model width is split already, or fsdp is too wide.
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

# Names that the modules give to activations, besides "batch".
ACTIVATION_AXES = ("act_heads", "act_mlp", "act_embed")

# Share of the parameter bytes that may lie on every device, biases and scales
# aside.
MAX_REPLICATED = 0.02


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where one parameter lies.

  Attributes:
    path: such as `params/encoder/layers/ffn/fc1_kernel`.
    shape: of the whole array.
    names: logical name of every dimension, None for one that has none.
    spec: mesh axes of every dimension, () for one that is not split.
    itemsize: bytes of an element.
  """

  path: str
  shape: tuple[int, ...]
  names: tuple[str | None, ...]
  spec: tuple[tuple[str, ...], ...]
  itemsize: int

  @property
  def partition_spec(self) -> PartitionSpec:
    """The same for jax."""
    return partition_spec(self.spec)

  @property
  def is_vector(self) -> bool:
    """Whether it is a bias or a scale, or a stack of these."""
    return len([name for name in self.names if name != "layers"]) < 2

  @property
  def bytes(self) -> int:
    """Bytes of the whole array."""
    return math.prod(self.shape) * self.itemsize

  def shard_shape(self, mesh_shape: MeshShape) -> tuple[int, ...]:
    """Returns the shape of the part that one device holds."""
    return tuple(
      size // math.prod(mesh_shape[axis] for axis in axes)
      for size, axes in zip(self.shape, self.spec, strict=True)
    )

  def parts(self, mesh_shape: MeshShape) -> int:
    """Returns the number of devices that hold different parts."""
    return math.prod(mesh_shape[axis] for axes in self.spec for axis in axes)


def partition_spec(spec: Iterable[tuple[str, ...]]) -> PartitionSpec:
  """Returns mesh axes by dimension in the form that jax takes."""
  return PartitionSpec(
    *(axes if len(axes) > 1 else (axes or (None,))[0] for axes in spec)
  )


class NoRuleError(Exception):
  """No rule applies to a dimension."""


def check_rules(rules: Iterable[Any]) -> tuple[Rule, ...]:
  """Returns the rules as tuples.

  Raises:
    UserError: an entry is no rule, or names a mesh axis that does not exist.
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
    for axis in _axes(axes):
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


def place(
  boxed: Any, mesh_shape: MeshShape, rules: Iterable[Any]
) -> list[Placement]:
  """Places every parameter, and checks that this is what one could want.

  Args:
    boxed: nested shapes of variables, boxed with `nn.with_logical_partitioning`
      or not; dimensions without a name are not split.
    mesh_shape: axis -> size; a mesh's `shape`.
    rules: see the module.

  Returns:
    The placements in the order of the tree.

  Raises:
    UserError: a dimension without a rule, a rule without a dimension, or too
      much that is not split. Each names the nearest mesh that works, if there
      is one.
  """
  rules = check_rules(rules)
  try:
    return _place(boxed, mesh_shape, rules)
  except UserError as error:
    size = math.prod(mesh_shape[axis] for axis in AXES)
    working = (s for s in shapes_of(size) if _works(boxed, s, rules))
    near = nearest_shape(mesh_shape, working)
    hint = ""
    if near is not None:
      flags = " ".join(f"--config.mesh.{axis}={near[axis]}" for axis in AXES)
      hint = f"; nearest mesh that works: {flags}"
    raise UserError(f"{error}{hint}") from error


def _works(boxed: Any, shape: MeshShape, rules: tuple[Rule, ...]) -> bool:
  try:
    _place(boxed, shape, rules)
  except UserError:
    return False
  return True


def _place(
  boxed: Any, mesh_shape: MeshShape, rules: tuple[Rule, ...]
) -> list[Placement]:
  flat_names = _flatten(nn.get_partition_spec(boxed))
  placements, used, known = [], set(), set()
  for path, leaf in _flatten(meta.unbox(boxed)).items():
    given = tuple(flat_names.get(path) or ())
    names = given + (None,) * (len(leaf.shape) - len(given))
    known.update(names)
    try:
      spec, here = resolve(names, leaf.shape, mesh_shape, rules)
    except NoRuleError as error:
      shape = "x".join(map(str, leaf.shape))
      raise UserError(
        f"mesh {format_shape(mesh_shape)}: {path} [{shape}]: {error}"
      ) from error
    used |= here
    placements.append(
      Placement(path, tuple(leaf.shape), names, spec, leaf.dtype.itemsize)
    )
  _check_used(rules, used, {name for name in known if name})
  _check_replicated(placements, mesh_shape)
  return placements


def resolve(
  names: tuple[str | None, ...],
  shape: tuple[int, ...],
  mesh_shape: MeshShape,
  rules: tuple[Rule, ...],
) -> tuple[tuple[tuple[str, ...], ...], set[int]]:
  """Applies the rules to one array.

  Args:
    names: logical name of every dimension, None for one that is not split.
    shape: of the array.
    mesh_shape: axis -> size.
    rules: see the module.

  Returns:
    The mesh axes of every dimension, and the rules that applied, by position.

  Raises:
    NoRuleError: a dimension has a name and no rule applies.
  """
  spec: list[tuple[str, ...] | None] = [None if name else () for name in names]
  used: set[int] = set()
  for index, (rule_name, rule_axes) in enumerate(rules):
    axes = _axes(rule_axes)
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
  """Says why no rule applies to a dimension."""
  name = str(names[dim])
  own = [rule for rule in rules if rule[0] == name]
  if not own:
    near = did_you_mean(name, {rule[0] for rule in rules})
    return (
      f'no rule for the axis "{name}".{near} Add ("{name}", None) to'
      " mesh.rules to leave it whole"
    )
  _, rule_axes = own[-1]
  axes = _axes(rule_axes)
  size = math.prod(mesh_shape[axis] for axis in axes)
  shown = f'the rule ("{name}", {rule_axes!r})'
  if shape[dim] % size:
    sizes = ", ".join(f"{axis}={mesh_shape[axis]}" for axis in axes)
    text = f'{shown} splits the axis "{name}" of {shape[dim]}, which does not'
    text += f" divide by {sizes}"
    if name == "vocab":
      text += f" (--config.model.vocab_multiple={128 * size} pads it)"
    return text
  return (
    f"{shown} uses a mesh axis that another axis of this array has already;"
    f' add ("{name}", None) after it'
  )


def _check_used(
  rules: tuple[Rule, ...], used: set[int], known: set[str]
) -> None:
  """Checks that every rule has an effect somewhere."""
  names = {*known, *ACTIVATION_AXES}
  for index, (name, axes) in enumerate(rules):
    if index in used or name in ACTIVATION_AXES:
      continue
    if name not in names:
      raise UserError(
        f'mesh.rules: ("{name}", {axes!r}) is never used: no array has such'
        f" an axis.{did_you_mean(name, names)}"
      )
    # A second choice is there for other meshes.
    if not any(rule[0] == name for rule in rules[:index]):
      raise UserError(
        f'mesh.rules: ("{name}", {axes!r}) is never used: its mesh axis is'
        " always taken or never divides"
      )


def _check_replicated(
  placements: list[Placement], mesh_shape: MeshShape
) -> None:
  """Checks that what should be split is, but for a small rest."""
  if mesh_shape["fsdp"] * mesh_shape["tensor"] == 1:
    return
  parameters = [p for p in placements if p.path.startswith("params/")]
  # What the rules give to `fsdp` is whole by intention where there is none.
  whole = [
    p
    for p in parameters
    if p.parts(mesh_shape) == 1
    and (mesh_shape["fsdp"] > 1 or not any(p.spec))
    and not p.is_vector
  ]
  total = sum(p.bytes for p in parameters)
  share = sum(p.bytes for p in whole) / max(total, 1)
  if share <= MAX_REPLICATED:
    return
  worst = max(whole, key=lambda p: p.bytes)
  shape = "x".join(map(str, worst.shape))
  names = ", ".join(str(name) for name in worst.names)
  raise UserError(
    f"mesh {format_shape(mesh_shape)}: {share:.0%} of the parameter bytes lie"
    f" on every device, more than {MAX_REPLICATED:.0%}; the largest is"
    f" {worst.path} [{shape}] with the axes ({names}); give one of them a rule"
    " in mesh.rules"
  )


def _axes(axes: Any) -> tuple[str, ...]:
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(axes)


def _flatten(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(dict(tree), sep="/")
