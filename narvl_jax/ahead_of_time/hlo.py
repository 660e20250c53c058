"""Parses the text of compiled programs (`compiled.as_text()`) of CPU and TPU.

The parser covers what the counts in `program.py` need: instructions by
computation, the types of their results, and calls.
"""

import dataclasses
import math
import re

import numpy as np

_BYTES = {
  **{f"{kind}{n}": n / 8 for kind in "su" for n in (4, 8, 16, 32, 64)},
  **{f"f{n}": n / 8 for n in (16, 32, 64)},
  **{"pred": 1, "bf16": 2, "c64": 8, "c128": 16},
}
_SHAPE = re.compile(r"\b(f8\w+|" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_PLACED = re.compile(_SHAPE.pattern + r"(\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(
  r"\b(calls|body|condition|to_apply|true_computation|false_computation"
  r"|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
# Groups of communicating devices, or (from, to) pairs of a permutation.
Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Array:
  """Type of an array: element type, such as "bf16", and dimensions."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    """Bytes of the elements, without the padding of a layout."""
    return math.ceil(self.size * _BYTES.get(self.dtype, 1))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the module, without "%".
    opcode: such as "fusion".
    type: text of the result's type.
    operands: names of the arguments.
    arguments: text between the parentheses, with literals.
    attributes: text after the parentheses.
  """

  name: str
  opcode: str
  type: str
  operands: tuple[str, ...]
  arguments: str
  attributes: str

  @property
  def arrays(self) -> tuple[Array, ...]:
    """All arrays of the result, including those in tuples."""
    return find_arrays(self.type)

  def called(self, *roles: str) -> list[str]:
    """Returns the computations that it calls in some roles, such as "body"."""
    names = []
    for role, value in _CALLED.findall(self.attributes):
      if role in roles:
        names += [n.strip().lstrip("%") for n in value.strip("{}").split(",")]
    return names

  def attribute(self, name: str) -> str | None:
    """Returns the text of an attribute up to the comma after it."""
    match = re.search(rf"\b{name}=", self.attributes)
    if match is None:
      return None
    return _until_comma(self.attributes[match.end() :])


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    computations: name -> instructions.
    entry: name of the entry computation.
    num_partitions: number of devices.
  """

  computations: dict[str, list[Instruction]]
  entry: str
  num_partitions: int


def parse(text: str) -> Module:
  """Parses the text of a module.

  Raises:
    ValueError: the text is not a module.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if current is None:
      match = _HEADER.match(line)
      if match:
        current = computations.setdefault(match.group(2), [])
        entry = match.group(2) if match.group(1) else entry
    elif line.startswith("}"):
      current = None
    else:
      instruction = _instruction(line)
      if instruction is not None:
        current.append(instruction)
  if not entry:
    raise ValueError("not the text of a compiled program: no ENTRY")
  partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
  return Module(
    computations, entry, int(partitions.group(1)) if partitions else 1
  )


def find_arrays(text: str) -> tuple[Array, ...]:
  """Returns the types of all arrays in a text."""
  return tuple(
    Array(dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in _SHAPE.findall(text)
  )


def hbm_bytes(text: str, everywhere: bool = False) -> float:
  """Returns the bytes of the arrays in a type that lie in main memory.

  Args:
    text: the type. A layout such as `{1,0:T(8,128)S(1)}` places an array in
      another memory, such as the VMEM of a TPU.
    everywhere: count those arrays, too.
  """
  return sum(
    Array(dtype, tuple(int(n) for n in dims.split(",") if n)).bytes
    for dtype, dims, layout in _PLACED.findall(text)
    if everywhere or "S(" not in layout
  )


def tuple_parts(text: str) -> list[str]:
  """Splits the text of a tuple type, or of arguments, at its commas."""
  if text.startswith("("):
    text = text[1 : _closing(text, 0)]
  parts = []
  while text:
    part = _until_comma(text)
    parts.append(part.strip())
    text = text[len(part) + 1 :]
  return parts


def _instruction(line: str) -> Instruction | None:
  match = _INSTRUCTION.match(_COMMENT.sub("", line))
  if match is None:
    return None
  rest = match.group(3)
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  opcode = re.match(r" ([\w\-]+)\(", rest[end:])
  if opcode is None:
    return None
  start = end + opcode.end() - 1
  stop = _closing(rest, start)
  arguments = rest[start + 1 : stop]
  return Instruction(
    name=match.group(2),
    opcode=opcode.group(1),
    type=rest[:end],
    operands=tuple(re.findall(r"%([^\s,()]+)", arguments)),
    arguments=arguments,
    attributes=rest[stop + 1 :],
  )


def _closing(text: str, start: int) -> int:
  """Returns the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.start()
  return len(text) - 1


def _until_comma(text: str) -> str:
  """Returns the text up to the first comma outside brackets."""
  depth = 0
  for match in re.compile(r"[()\[\]{},]").finditer(text):
    if match.group() in "([{":
      depth += 1
    elif match.group() in ")]}":
      depth -= 1
    if depth < 0 or (depth == 0 and match.group() == ","):
      return text[: match.start()]
  return text


def parse_groups(text: str, num_partitions: int) -> Groups:
  """Parses `replica_groups` or `source_target_pairs`.

  The forms are `{{0,1},{2,3}}`; an iota that is reshaped, transposed and
  reshaped, `[2,4]<=[8]` or `[2,4]<=[4,2]T(1,0)`; the devices along some axes
  of a mesh, `mesh['a'=2,'b'=4] {'b'}`, with an optional order after the sizes,
  `, device_ids=([4,2]T(1,0))`. Nothing or `{}` is one group of all devices.

  Raises:
    ValueError: the form is unknown.
  """
  text = text.strip()
  if text in ("", "{}"):
    return (tuple(range(num_partitions)),)
  if text.startswith("{{"):
    return tuple(
      tuple(int(n) for n in group.split(","))
      for group in re.findall(r"\{([\d,\s]+)\}", text)
    )
  if "<=" in text and text.startswith("["):
    return _rows(_iota(text))
  match = re.match(r"mesh\[(.*?)\](.*?)\{(.*)\}$", text)
  if match is None:
    raise ValueError(f"unknown replica groups {text[:80]!r}")
  sizes = {
    name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])
  }
  ids = np.arange(math.prod(sizes.values()))
  order = re.search(r"\(\[([\d,]+)\]T\(([\d,]+)\)\)", match[2])
  if order is not None:
    ids = ids.reshape(_numbers(order[1])).transpose(_numbers(order[2]))
  return _rows(_mesh_groups(ids, sizes, match[3]))


def _iota(text: str) -> np.ndarray:
  """Parses `[2,4]<=[4,2]T(1,0)`."""
  match = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  assert match is not None, text
  shape, source = _numbers(match[1]), _numbers(match[2])
  ids = np.arange(math.prod(source)).reshape(source)
  if match[3]:
    ids = ids.transpose(_numbers(match[3]))
  return ids.reshape(shape)


def _mesh_groups(
  ids: np.ndarray, sizes: dict[str, int], axes: str
) -> np.ndarray:
  """Returns ids [groups, members] along `'a'` or parts `'a':(before)size`."""
  dims: list[int] = []
  chosen: dict[tuple[str, int], int] = {}
  parts = [
    (name, int(before or 1), int(size or sizes[name]))
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
  ]
  for axis, total in sizes.items():
    left = 1
    for name, before, size in sorted(parts):
      if name != axis:
        continue
      dims.append(before // left)
      chosen[name, before] = len(dims)
      dims.append(size)
      left = before * size
    dims.append(total // left)
  members = [chosen[name, before] for name, before, _ in parts]
  others = [i for i in range(len(dims)) if i not in members]
  size = math.prod(dims[i] for i in members)
  return ids.reshape(dims).transpose(others + members).reshape(-1, size)


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(","))


def _rows(ids: np.ndarray) -> Groups:
  return tuple(tuple(int(i) for i in row) for row in ids)
