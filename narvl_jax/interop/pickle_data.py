"""Pickles read as data: nothing is imported, called or changed.

A pickle is a program for a small stack machine. `pickle.Unpickler` runs it and
can be made to call functions, to hash values that never end, or to take any
amount of memory. This reader interprets the same opcodes, but builds only
plain values and what its caller supplies, and it counts what it builds.
"""

import dataclasses
import pickletools
import types
from collections.abc import Callable
from typing import Any

# A checkpoint of the largest official model, with its optimizer, has 250,000.
MAX_OPCODES = 1 << 20
# Of the content, each value counted as often as it is referred to.
MAX_VALUES = 1 << 20
MAX_CHARACTERS = 1 << 24
MAX_DEPTH = 100
_MAX_INTEGER_BITS = 512
_MAX_NAME = 1000
# Hashes of larger integers can be made to collide.
_MAX_KEY = 1 << 60


class UnsafePickleError(Exception):
  """A pickle asks for something that is not needed to read tensors."""


class Inert:
  """Stands for an object that is not needed; remembers nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class StandIn:
  """Stands for a class or a function of the pickle.

  Attributes:
    build: arguments of the call -> its value.
  """

  build: Callable[..., Any]


def read_pickle(
  data: bytes,
  find: Callable[[str, str], Any],
  persistent: Callable[[Any], Any],
) -> Any:
  """Returns the value that a pickle describes.

  Args:
    data: the pickle.
    find: (module, name) -> a `StandIn`, or a value that cannot be called.
    persistent: persistent id -> value.

  Returns:
    Dicts, lists, tuples, sets and plain values; what `find` and `persistent`
    make. No value is deeper than `MAX_DEPTH`.

  Raises:
    UnsafePickleError: the pickle uses what is not needed to read tensors, or
      is larger than any checkpoint.
    ValueError: it is damaged; other errors of `find` and `persistent`.
  """
  machine = _Machine(find, persistent)
  for opcode, argument, _ in pickletools.genops(data):
    if opcode.name == "STOP":
      break
    machine.step(opcode.name, argument)
  value = machine.pop()
  _check_size(value)
  return value


def _check_size(value: Any) -> None:
  """Checks that what code will do with a value comes to an end.

  A few bytes describe a list that holds itself, or one of 2^40 values by
  referring 40 times to the list before.
  """
  values = characters = 0
  left = [(value, 0)]
  while left:
    item, depth = left.pop()
    values += 1
    if isinstance(item, types.SimpleNamespace):
      item = vars(item)
    parts: Any = ()
    if isinstance(item, (str, bytes, bytearray)):
      characters += len(item)
    elif isinstance(item, dict):
      parts = [*item, *item.values()]
    elif isinstance(item, (list, tuple, set, frozenset)):
      parts = item
    if depth > MAX_DEPTH:
      raise UnsafePickleError(
        f"its pickle is nested deeper than {MAX_DEPTH} levels"
      )
    if values + len(left) + len(parts) > MAX_VALUES:
      raise UnsafePickleError(f"its pickle has over {MAX_VALUES:,} values")
    if characters > MAX_CHARACTERS:
      raise UnsafePickleError(
        f"its pickle has over {MAX_CHARACTERS:,} characters"
      )
    left.extend((part, depth + 1) for part in parts)


class _Machine:
  """The stack, its marks, and the values that were noted for later."""

  def __init__(
    self, find: Callable[[str, str], Any], persistent: Callable[[Any], Any]
  ) -> None:
    self._find, self._persistent = find, persistent
    self._stack: list[Any] = []
    self._marked: list[list[Any]] = []
    # A dict: as a table it would be as long as its largest index.
    self._memo: dict[int, Any] = {}
    self._work = 0

  def step(self, name: str, argument: Any) -> None:
    """Carries out one opcode."""
    self._spend(1)
    if name in _CONSTANTS:
      self._stack.append(_CONSTANTS[name]())
    elif name in _VALUES:
      self._stack.append(_plain_value(name, argument))
    elif (action := _ACTIONS.get(name)) is not None:
      action(self, argument)
    elif name not in ("PROTO", "FRAME"):
      raise UnsafePickleError(f"its pickle uses the opcode {name}")

  def pop(self) -> Any:
    """Returns the topmost value and removes it."""
    if not self._stack:
      raise ValueError("the pickle takes a value from an empty stack")
    return self._stack.pop()

  def _spend(self, steps: int) -> None:
    """Counts work, of which one opcode may ask for much."""
    self._work += steps
    if self._work > MAX_OPCODES:
      raise UnsafePickleError(f"its pickle has over {MAX_OPCODES:,} opcodes")

  def _top(self) -> Any:
    if not self._stack:
      raise ValueError("the pickle uses a value of an empty stack")
    return self._stack[-1]

  def _pop_marked(self) -> list[Any]:
    if not self._marked:
      raise ValueError("the pickle uses a mark that it has not set")
    items, self._stack = self._stack, self._marked.pop()
    return items

  def mark(self, _: Any) -> None:
    """Begins a group of values."""
    self._marked.append(self._stack)
    self._stack = []

  def pop_one(self, _: Any) -> None:
    """Drops a value, or a mark where there is none."""
    if self._stack:
      self._stack.pop()
    else:
      self._pop_marked()

  def pop_group(self, _: Any) -> None:
    """Drops a group of values."""
    self._pop_marked()

  def duplicate(self, _: Any) -> None:
    """Repeats the topmost value."""
    self._stack.append(self._top())

  def get(self, index: int) -> None:
    """Repeats a value that was noted."""
    if index not in self._memo:
      raise ValueError(f"the pickle refers to the value {index}, not noted")
    self._stack.append(self._memo[index])

  def put(self, index: int | None) -> None:
    """Notes the topmost value."""
    self._memo[len(self._memo) if index is None else index] = self._top()

  def group(self, kind: Callable[[list[Any]], Any]) -> None:
    """Replaces a group by one value."""
    value = kind(self._pop_marked())
    self._stack.append(value)

  def small_tuple(self, size: int) -> None:
    """Replaces the topmost values by a tuple."""
    items = [self.pop() for _ in range(size)]
    self._stack.append(tuple(reversed(items)))

  def extend(self, items: list[Any]) -> None:
    """Appends to the topmost list."""
    holder = self._top()
    if isinstance(holder, list):
      holder.extend(items)
    elif not isinstance(holder, Inert):
      raise ValueError(f"the pickle appends to a {type(holder).__name__}")

  def update(self, items: list[Any]) -> None:
    """Sets keys and values of the topmost dict."""
    holder = self._top()
    if isinstance(holder, dict):
      holder.update(_pairs(items))
    elif not isinstance(holder, Inert):
      raise ValueError(f"the pickle sets items of a {type(holder).__name__}")

  def add(self, _: Any) -> None:
    """Adds a group to the topmost set."""
    items = self._pop_marked()
    holder = self._top()
    if not isinstance(holder, set):
      raise ValueError(f"the pickle adds to a {type(holder).__name__}")
    holder.update(map(checked_key, items))

  def append_one(self, _: Any) -> None:
    """Appends a value."""
    value = self.pop()
    self.extend([value])

  def append_group(self, _: Any) -> None:
    """Appends a group of values."""
    self.extend(self._pop_marked())

  def set_one(self, _: Any) -> None:
    """Sets one item of a dict."""
    value, key = self.pop(), self.pop()
    self.update([key, value])

  def set_group(self, _: Any) -> None:
    """Sets items of a dict."""
    self.update(self._pop_marked())

  def find_global(self, argument: str) -> None:
    """Finds what stands for a name."""
    module, _, name = argument.partition(" ")
    self._stack.append(self._find_checked(module, name))

  def find_stacked(self, _: Any) -> None:
    """Finds what stands for a name on the stack."""
    name, module = self.pop(), self.pop()
    self._stack.append(self._find_checked(module, name))

  def _find_checked(self, module: Any, name: Any) -> Any:
    for part in (module, name):
      if not isinstance(part, str) or len(part) > _MAX_NAME:
        raise UnsafePickleError("its pickle has a class without a proper name")
    return self._find(module, name)

  def call(self, _: Any) -> None:
    """Replaces a stand-in and its arguments by what it builds."""
    arguments, function = self.pop(), self.pop()
    self._build(function, arguments)

  def call_with_names(self, _: Any) -> None:
    """The same where some arguments have names, which nothing needs."""
    self.pop()
    self.call(None)

  def call_group(self, _: Any) -> None:
    """The same in the form of old pickles."""
    items = self._pop_marked()
    if not items:
      raise ValueError("the pickle calls nothing")
    self._build(items[0], tuple(items[1:]))

  def call_global(self, argument: str) -> None:
    """The same with the name of the class."""
    items = self._pop_marked()
    module, _, name = argument.partition(" ")
    self._build(self._find_checked(module, name), tuple(items))

  def _build(self, function: Any, arguments: Any) -> None:
    if not isinstance(function, StandIn) or not isinstance(arguments, tuple):
      raise UnsafePickleError("its pickle calls something that is no function")
    lists = (x for x in arguments if isinstance(x, list))
    self._spend(len(arguments) + sum(map(len, lists)))
    self._stack.append(function.build(*arguments))

  def set_state(self, _: Any) -> None:
    """Fills a namespace; the state of other objects is not needed."""
    state, holder = self.pop(), self._top()
    if isinstance(holder, types.SimpleNamespace):
      if not isinstance(state, dict):
        raise ValueError("the pickle has a namespace without names")
      self._spend(len(state))
      if not all(isinstance(key, str) for key in state):
        raise ValueError("the pickle has a namespace without names")
      vars(holder).update(state)
    elif not isinstance(holder, (Inert, dict)):
      raise TypeError(
        "a tensor has no state, and neither has what the pickle knows as"
        f" {type(holder).__name__}"
      )

  def refer(self, argument: Any) -> None:
    """Finds what a persistent id stands for."""
    self._stack.append(self._persistent(argument))

  def refer_stacked(self, _: Any) -> None:
    """The same for an id on the stack."""
    self.refer(self.pop())


def checked_key(value: Any) -> Any:
  """Returns a value that is quick to hash.

  Raises:
    UnsafePickleError: hashing it could take for ever.
  """
  parts = value if type(value) is tuple and len(value) <= 16 else (value,)
  for part in parts:
    if isinstance(part, int):
      if abs(part) < _MAX_KEY:
        continue
    elif isinstance(part, (str, bytes)):
      if len(part) <= _MAX_NAME:
        continue
    elif isinstance(part, (float, type(None), Inert)):
      continue
    raise UnsafePickleError(
      f"its pickle has a large key or one of type {type(part).__name__}"
    )
  return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
  if len(items) % 2:
    raise ValueError("the pickle has a key without a value")
  return dict(zip(map(checked_key, items[::2]), items[1::2], strict=True))


def _plain_value(name: str, argument: Any) -> Any:
  if name in _TEXT_OF_PYTHON_2:
    # pickletools reads it as Latin 1.
    return argument.encode("latin-1").decode("utf-8")
  if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
    raise UnsafePickleError(
      f"its pickle has an integer of {argument.bit_length():,} bits"
    )
  return argument


_CONSTANTS: dict[str, Callable[[], Any]] = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_LIST": list,
  "EMPTY_TUPLE": tuple,
  "EMPTY_DICT": dict,
  "EMPTY_SET": set,
}
_TEXT_OF_PYTHON_2 = ("STRING", "BINSTRING", "SHORT_BINSTRING")
_VALUES = frozenset(
  (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT"),
    *_TEXT_OF_PYTHON_2,
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
  )
)
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
  "MARK": _Machine.mark,
  "POP": _Machine.pop_one,
  "POP_MARK": _Machine.pop_group,
  "DUP": _Machine.duplicate,
  **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
  **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
  "TUPLE": lambda machine, _: machine.group(tuple),
  "TUPLE1": lambda machine, _: machine.small_tuple(1),
  "TUPLE2": lambda machine, _: machine.small_tuple(2),
  "TUPLE3": lambda machine, _: machine.small_tuple(3),
  "LIST": lambda machine, _: machine.group(list),
  "DICT": lambda machine, _: machine.group(_pairs),
  "FROZENSET": lambda machine, _: machine.group(
    lambda items: frozenset(map(checked_key, items))
  ),
  "APPEND": _Machine.append_one,
  "APPENDS": _Machine.append_group,
  "SETITEM": _Machine.set_one,
  "SETITEMS": _Machine.set_group,
  "ADDITEMS": _Machine.add,
  "GLOBAL": _Machine.find_global,
  "STACK_GLOBAL": _Machine.find_stacked,
  "REDUCE": _Machine.call,
  "NEWOBJ": _Machine.call,
  "NEWOBJ_EX": _Machine.call_with_names,
  "OBJ": _Machine.call_group,
  "INST": _Machine.call_global,
  "BUILD": _Machine.set_state,
  "PERSID": _Machine.refer,
  "BINPERSID": _Machine.refer_stacked,
}
