"""Places every parameter by the rules, and checks the result."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import flax.traverse_util
from flax.linen import meta
from jax.sharding import PartitionSpec

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.parallel.mesh import (
  AXES,
  MeshShape,
  format_shape,
  nearest_shape,
  shapes_of,
)
from narvl_jax.parallel.rules import (
  ACTIVATION_AXES,
  NoRuleError,
  Rule,
  check_rules,
  partition_spec,
  resolve,
)

# Largest replicated share of the parameter bytes, without biases and scales.
MAX_REPLICATED = 0.02


@dataclasses.dataclass(frozen=True)
class Placement:
  """Placement of one parameter.

  Attributes:
    path: such as `params/encoder/layers/ffn/fc1_kernel`.
    shape: shape of the whole array.
    names: logical name of every dimension, None if it has none.
    spec: mesh axes of every dimension, () if it is not split.
    itemsize: bytes of an element.
  """

  path: str
  shape: tuple[int, ...]
  names: tuple[str | None, ...]
  spec: tuple[tuple[str, ...], ...]
  itemsize: int

  @property
  def partition_spec(self) -> PartitionSpec:
    """`spec` as a `PartitionSpec`."""
    return partition_spec(self.spec)

  @property
  def is_vector(self) -> bool:
    """Whether the array is a bias or a scale, or a stack of these."""
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


def place(
  boxed: Any, mesh_shape: MeshShape, rules: Iterable[Any]
) -> list[Placement]:
  """Places every parameter, and checks the placements.

  Args:
    boxed: nested shapes of variables, boxed with `nn.with_logical_partitioning`
      or not. Dimensions without a name are not split.
    mesh_shape: axis -> size, the `shape` of a mesh.
    rules: see `narvl_jax.parallel.rules`.

  Returns:
    The placements in the order of the tree.

  Raises:
    UserError: no rule applies to a dimension, a rule is never used, or too
      many bytes are replicated. It names the nearest mesh that works, if any.
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


def _check_used(
  rules: tuple[Rule, ...], used: set[int], known: set[str]
) -> None:
  """Checks that every rule applies to some array."""
  names = {*known, *ACTIVATION_AXES}
  for index, (name, axes) in enumerate(rules):
    if index in used or name in ACTIVATION_AXES:
      continue
    if name not in names:
      raise UserError(
        f'mesh.rules: ("{name}", {axes!r}) is never used: no array has such'
        f" an axis.{did_you_mean(name, names)}"
      )
    # A second rule for a name may be needed on other meshes.
    if not any(rule[0] == name for rule in rules[:index]):
      raise UserError(
        f'mesh.rules: ("{name}", {axes!r}) is never used: its mesh axis is'
        " always in use or never divides"
      )


def _check_replicated(
  placements: list[Placement], mesh_shape: MeshShape
) -> None:
  """Checks that few bytes of the parameters are replicated."""
  if mesh_shape["fsdp"] * mesh_shape["tensor"] == 1:
    return
  parameters = [p for p in placements if p.path.startswith("params/")]
  # With fsdp=1, arrays that the rules assign to `fsdp` are whole on purpose.
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
    f"mesh {format_shape(mesh_shape)}: {share:.0%} of the parameter bytes are"
    f" on every device, more than {MAX_REPLICATED:.0%}; the largest is"
    f" {worst.path} [{shape}] with the axes ({names}); give one of them a rule"
    " in mesh.rules"
  )


def _flatten(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(dict(tree), sep="/")
