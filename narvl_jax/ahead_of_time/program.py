"""Counts of a compiled program on one device, from its text.

Bodies of loops count once per iteration, unlike in `cost_analysis()`.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from narvl_jax.ahead_of_time.costs import Line, calls, op_name, read_lines
from narvl_jax.ahead_of_time.hlo import (
  Array,
  Groups,
  Instruction,
  Module,
  find_arrays,
  parse,
  parse_groups,
  tuple_parts,
)

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# These make no new array.
_PASSING = ("parameter", "tuple", "get-tuple-element", "bitcast", "while")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A communication between devices, as one of them sees it.

  Attributes:
    kind: one of `KINDS`.
    arrays: the whole arrays of the group: results of an all-gather, operands
      of a reduce-scatter, either of the others.
    count: number of executions in one run of the program.
    groups: groups of communicating devices, by position in the mesh; (from,
      to) pairs of a collective-permute.
    op_name: operation of the JAX program that it comes from.
  """

  kind: str
  arrays: tuple[Array, ...]
  count: int
  groups: Groups
  op_name: str

  @property
  def bytes(self) -> int:
    """Bytes of the arrays times `count`."""
    return self.count * sum(array.bytes for array in self.arrays)

  def traffic(self, block: int) -> tuple[float, float]:
    """Returns the bytes that a device receives in all executions.

    Groups form rings. A group that spans several blocks communicates within
    each block first; then each device exchanges its part with other blocks.

    Args:
      block: number of devices on the faster network, such as a slice.

    Returns:
      Bytes from devices of the same block and from devices of other blocks.
    """
    group = max(self.groups, key=len)
    across = len({device // block for device in group})
    if self.kind == "collective-permute":
      return (0.0, self.bytes) if across > 1 else (self.bytes, 0.0)
    within = len(group) // across
    passes = 2 if self.kind == "all-reduce" else 1
    return (
      passes * (within - 1) / within * self.bytes,
      passes * (across - 1) / across * self.bytes / within,
    )

  def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes of a mesh along which devices communicate."""
    found = set()
    for group in self.groups:
      for axis, stride, size in _strides(mesh_shape):
        if len({device // stride % size for device in group}) > 1:
          found.add(axis)
    return tuple(axis for axis in mesh_shape if axis in found)


@dataclasses.dataclass(frozen=True)
class Program:
  """Counts of one run on one device.

  Attributes:
    collectives: in the order of the text.
    lines: cost of every instruction.
    arrays: arrays that instructions outside of fusions make -> operations of
      the JAX program. Arrays within a fusion are never in memory as a whole.
    num_partitions: number of devices.
  """

  collectives: tuple[Collective, ...]
  lines: tuple[Line, ...]
  arrays: Mapping[Array, frozenset[str]]
  num_partitions: int

  @property
  def flops(self) -> float:
    """Operations of products and convolutions, 2 per multiply-add."""
    return sum(line.flops for line in self.lines)

  @property
  def cycles(self) -> float:
    """The compiler's estimate without collectives; 0 except on TPU."""
    return sum(line.cycles for line in self.lines)

  @property
  def hbm_bytes(self) -> float:
    """Estimated bytes that are read and written outside of VMEM."""
    return sum(line.hbm_bytes for line in self.lines)

  @property
  def kernels(self) -> list[Line]:
    """Pallas kernels, for which the compiler gives no cycles."""
    return [line for line in self.lines if line.kernel]

  def by_kind(self) -> dict[str, tuple[int, int]]:
    """Returns kind -> (count, bytes) for the kinds that occur."""
    totals: dict[str, tuple[int, int]] = {}
    for kind in KINDS:
      mine = [c for c in self.collectives if c.kind == kind]
      if mine:
        count = sum(c.count for c in mine)
        totals[kind] = count, sum(c.bytes for c in mine)
    return totals

  @property
  def collective_bytes(self) -> int:
    """Bytes of all collectives."""
    return sum(c.bytes for c in self.collectives)

  def shapes(self, *kinds: str) -> set[tuple[int, ...]]:
    """Returns the shapes of collectives of some kinds, or of all."""
    return {
      array.shape
      for c in self.collectives
      if not kinds or c.kind in kinds
      for array in c.arrays
    }


def read_program(text: str | None, unknown_trips: int = 1) -> Program:
  """Counts a compiled program from its text (`as_text()`).

  Args:
    text: of the program.
    unknown_trips: iterations of loops that end by a condition on data.

  Raises:
    ValueError: the text is not a module.
  """
  module = parse(text or "")
  counter = _Counter(module, unknown_trips)
  found = counter.total(module.entry, fused=False)
  return Program(
    collectives=tuple(
      dataclasses.replace(collective, count=count)
      for collective, count in found.items()
    ),
    lines=read_lines(module, unknown_trips),
    arrays=counter.arrays(),
    num_partitions=module.num_partitions,
  )


class _Counter:
  """Sums a module from its leaves to its entry."""

  def __init__(self, module: Module, unknown_trips: int) -> None:
    self._module = module
    self._unknown_trips = unknown_trips
    self._outside: set[str] = set()
    self.total = functools.cache(self._total)

  def arrays(self) -> dict[Array, frozenset[str]]:
    """Returns the arrays that instructions outside of fusions make."""
    found: collections.defaultdict[Array, set[str]]
    found = collections.defaultdict(set)
    for name in self._outside:
      for instruction in self._module.computations[name]:
        if instruction.opcode in _PASSING:
          continue
        for array in instruction.arrays:
          found[array].add(op_name(instruction))
    return {array: frozenset(names) for array, names in found.items()}

  def _total(self, name: str, fused: bool) -> collections.Counter[Collective]:
    """Counts the collectives of one run of a computation."""
    total: collections.Counter[Collective] = collections.Counter()
    if not fused:
      self._outside.add(name)
    instructions = self._module.computations[name]
    types = {i.name: i.type for i in instructions}
    starts_async = any(
      "AsyncCollectiveStart" in i.attributes for i in instructions
    )
    for i in instructions:
      # An overlapped collective appears in every fusion during which it runs.
      continued = "chain_id=" in i.attributes and not starts_async
      if not (fused and continued):
        found = _collective(i, name, self._module, types)
        if found is not None:
          total[found] += 1
      for called, times, inner in calls(self._module, i, self._unknown_trips):
        for found, count in self.total(called, fused or inner).items():
          total[found] += times * count
    return total


def _collective(
  i: Instruction, computation: str, module: Module, types: Mapping[str, str]
) -> Collective | None:
  """Returns the collective of an instruction, counted once, or None."""
  kind = i.opcode.removesuffix("-start")
  if kind not in KINDS:
    return None
  result = find_arrays(i.type)
  if i.opcode in ("all-gather-start", "collective-permute-start"):
    # (operands, results, ...)
    result = find_arrays(tuple_parts(i.type)[1])
  if kind == "reduce-scatter":
    result = find_arrays(" ".join(types[name] for name in i.operands))
  # On TPUs this is a fusion that keeps one part of the sum.
  if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  mesh = re.search(r"replica_groups=(mesh\[.*?\{.*?\})", i.attributes)
  groups = mesh.group(1) if mesh else i.attribute("replica_groups")
  groups = groups or i.attribute("source_target_pairs")
  return Collective(
    kind,
    result,
    1,
    parse_groups(groups or "", module.num_partitions),
    op_name(i),
  )


def _strides(
  mesh_shape: Mapping[str, int],
) -> Iterator[tuple[str, int, int]]:
  stride = math.prod(mesh_shape.values())
  for axis, size in mesh_shape.items():
    stride //= size
    yield axis, stride, size
