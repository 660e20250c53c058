"""Cost of each instruction of a compiled program on one device.

Cycles are the compiler's estimate. It gives none for Pallas kernels; their
time is estimated from the `cost_estimate` of `pallas_call`.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

from narvl_jax.ahead_of_time.hlo import Instruction, Module, hbm_bytes
from narvl_jax.ahead_of_time.products import product_flops
from narvl_jax.ahead_of_time.topology import Chip

# Share of the peak at which a kernel is assumed to compute.
KERNEL_PEAK = 0.4

# These move nothing, or are counted by their other half.
_FREE = re.compile(
  r"parameter|tuple|get-tuple-element|bitcast|while|call|conditional|constant"
  r"|iota|partition-id|opt-barrier|after-all|async-.*|.*-done"
)
# Their operation is counted where it starts.
_ENDS = ("async-done", "async-update")
_COLLECTIVES = ("all-", "reduce-scatter", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Line:
  """An instruction outside of fusions, with its cost over all executions.

  Attributes:
    name: of the instruction.
    opcode: such as "fusion".
    type: text of its result's type.
    op_name: operation of the JAX program; that of the largest product of a
      fusion.
    count: executions in one run of the program.
    cycles: the compiler's estimate; 0 except on TPU.
    flops: of matrix products and convolutions, or as a kernel declares.
    hbm_bytes: read and written outside of VMEM, or as a kernel declares.
    kernel: whether it is a Pallas kernel.
    blind: whether it is one without a `cost_estimate`: only its operands and
      results count.
  """

  name: str
  opcode: str
  type: str
  op_name: str
  count: int
  cycles: float
  flops: float
  hbm_bytes: float
  kernel: bool = False
  blind: bool = False

  def seconds(self, chip: Chip) -> float:
    """Returns the estimated time on a chip."""
    if self.kernel:
      return max(
        self.flops / (KERNEL_PEAK * chip.peak_flops),
        self.hbm_bytes / chip.hbm_bandwidth,
      )
    return self.cycles / chip.clock


def read_lines(module: Module, unknown_trips: int = 1) -> tuple[Line, ...]:
  """Returns the instructions of a program that cost something.

  Args:
    module: the program.
    unknown_trips: iterations of loops that end by a condition on data.
  """
  return tuple(_Reader(module, unknown_trips).lines(module.entry, 1))


def calls(
  module: Module, i: Instruction, unknown_trips: int = 1
) -> Iterator[tuple[str, int, bool]]:
  """Yields computation, number of executions, and whether it is fused.

  The number of iterations of a loop is the annotation of XLA, or otherwise the
  largest integer constant of its condition: loops of `jax.lax.scan` count from
  0. Every branch of a conditional counts.
  """
  if i.opcode in _ENDS:
    return
  if i.opcode == "while":
    (body,), (condition,) = i.called("body"), i.called("condition")
    yield body, _trip_count(module, i, condition) or unknown_trips, False
  elif i.opcode == "fusion":
    yield from ((name, 1, True) for name in i.called("calls"))
  elif i.opcode in ("call", "async-start", "conditional"):
    for name in i.called(
      "calls",
      "to_apply",
      "true_computation",
      "false_computation",
      "branch_computations",
    ):
      yield name, 1, False


def op_name(i: Instruction) -> str:
  """Returns the operation of the JAX program that an instruction is from."""
  found = re.search(r'op_name="([^"]*)"', i.attributes)
  return found.group(1) if found else ""


def _trip_count(module: Module, loop: Instruction, condition: str) -> int:
  """Returns the iterations of a loop, 0 if unknown."""
  known = re.search(
    r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes
  )
  if known:
    return int(known.group(1))
  count, todo = 0, [condition]
  while todo:
    for instruction in module.computations[todo.pop()]:
      todo += instruction.called("calls")
      literal = re.fullmatch(r"\d+", instruction.arguments)
      if instruction.opcode == "constant" and literal:
        count = max(count, int(literal.group()))
  return count


def _figure(i: Instruction, name: str) -> float:
  """Returns a number of the backend's configuration, 0 if it is absent."""
  found = re.search(rf'"{name}":"(\d+)"', i.attributes)
  return float(found.group(1)) if found else 0.0


class _Reader:
  """Walks a module from its entry."""

  def __init__(self, module: Module, unknown_trips: int) -> None:
    self._module = module
    self._unknown_trips = unknown_trips
    self._types = {
      name: {i.name: i.type for i in instructions}
      for name, instructions in module.computations.items()
    }
    self._product = functools.cache(self._find_product)
    self._uses = functools.cache(self._find_uses)
    self._reads = functools.cache(self._find_reads)

  def lines(self, computation: str, times: int) -> Iterator[Line]:
    for i in self._module.computations[computation]:
      for name, count, fused in calls(self._module, i, self._unknown_trips):
        if not fused:
          yield from self.lines(name, times * count)
      free = _FREE.fullmatch(i.opcode)
      if not free or _figure(i, "estimated_cycles"):
        yield self._line(i, computation, times)

  def _line(self, i: Instruction, computation: str, times: int) -> Line:
    types = self._types[computation]
    flops, name = product_flops(i, types), op_name(i)
    if i.opcode == "fusion":
      (fused,) = i.called("calls")
      flops, product = self._product(fused)
      name = product or name
      moved = self._fusion_bytes(i, fused, types)
    else:
      moved = _moved(i, types)
    kernel = 'custom_call_target="tpu_custom_call"' in i.attributes
    declared = '"cost_estimate"' in i.attributes
    if kernel and declared:
      flops, moved = _figure(i, "flops"), _figure(i, "bytes_accessed")
    return Line(
      name=i.name,
      opcode=i.opcode,
      type=i.type,
      op_name=name,
      count=times,
      cycles=times * _figure(i, "estimated_cycles"),
      flops=times * flops,
      hbm_bytes=times * moved,
      kernel=kernel,
      blind=kernel and not declared,
    )

  def _find_product(self, computation: str) -> tuple[float, str]:
    """Returns the operations, and the op_name of the largest product."""
    total, largest, name = 0.0, 0.0, ""
    for i in self._module.computations[computation]:
      flops, own = product_flops(i, self._types[computation]), op_name(i)
      for called in i.called("calls"):
        flops, own = self._product(called)
      total += flops
      if flops > largest:
        largest, name = flops, own
    return total, name

  def _fusion_bytes(
    self, i: Instruction, fused: str, types: Mapping[str, str]
  ) -> float:
    """Returns what a fusion reads and writes.

    An array that is updated in place is written only where it changes.
    """
    written, read = hbm_bytes(i.type), 0.0
    for index, operand in enumerate(i.operands):
      whole = hbm_bytes(types.get(operand, ""))
      if not whole:
        continue
      uses = self._uses(fused, index)
      if uses and all(_updates(use, place) for use, place in uses):
        inner = self._types[fused]
        update = sum(hbm_bytes(inner[use.operands[1]], True) for use, _ in uses)
        written -= max(0.0, whole - update)
        continue
      part = self._reads(fused, index)
      read += whole if part is None else min(whole, part)
    return max(written, 0.0) + read

  def _find_reads(self, computation: str, index: int) -> float | None:
    """Returns the bytes that are read of a parameter; None: all of it."""
    uses, total = self._uses(computation, index), 0.0
    if not uses:
      # It is the result, under another name.
      return None
    for use, place in uses:
      if use.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
        total += hbm_bytes(use.type, True)
      elif use.opcode == "fusion":
        inner = self._reads(use.called("calls")[0], place)
        if inner is None:
          return None
        total += inner
      elif not _updates(use, place):
        return None
    return total

  def _find_uses(
    self, computation: str, index: int
  ) -> tuple[tuple[Instruction, int], ...]:
    """Returns who uses a parameter, and as which operand."""
    instructions = self._module.computations[computation]
    uses = collections.defaultdict(list)
    start = ""
    for i in instructions:
      if i.opcode == "parameter" and i.arguments == str(index):
        start = i.name
      for place, operand in enumerate(i.operands):
        uses[operand].append((i, place))
    found, todo = [], [start]
    while todo:
      for use, place in uses[todo.pop()]:
        # The same values under another name.
        if use.opcode in ("bitcast", "copy", "reshape"):
          todo.append(use.name)
        else:
          found.append((use, place))
    return tuple(found)


def _updates(i: Instruction, place: int) -> bool:
  """Returns whether an operand is an array that is updated in place."""
  return i.opcode == "dynamic-update-slice" and place == 0


def _moved(i: Instruction, types: Mapping[str, str]) -> float:
  """Returns the bytes that an instruction outside of fusions moves."""
  if i.opcode == "dynamic-slice":
    return 2 * hbm_bytes(i.type)
  if i.opcode == "dynamic-update-slice":
    return 2 * hbm_bytes(types[i.operands[1]])
  own = hbm_bytes(i.type)
  if i.opcode.startswith(_COLLECTIVES) or i.opcode.endswith("-start"):
    return own
  return own + sum(hbm_bytes(types.get(name, "")) for name in i.operands)
