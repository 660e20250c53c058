"""Pickles read as data: nothing is imported or called.

A pickle is a program for a small stack machine that can call any function,
hash values for ever and use any amount of memory. Here the pure Python
unpickler of the standard library runs a subset of the opcodes; those that look
up names or call something are replaced, and the size is limited.
"""

import dataclasses
import io
import pickle
import pickletools
import struct
import types
from collections.abc import Callable
from typing import Any, ClassVar

# The largest official model, with its optimizer, has 250,000 opcodes.
MAX_OPCODES = 1 << 20
# Limits of the result; a value counts once per reference.
MAX_VALUES = 1 << 20
MAX_CHARACTERS = 1 << 24
MAX_DEPTH = 100
_MAX_INTEGER_BITS = 512
_MAX_NAME = 1000
# Larger integers can be chosen to have equal hashes.
_MAX_KEY = 1 << 60

_OPCODES = frozenset(
  (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP"),
    *("GET", "BINGET", "LONG_BINGET"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("NONE", "NEWTRUE", "NEWFALSE", "FLOAT", "BINFLOAT"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("EMPTY_SET", "ADDITEMS", "FROZENSET"),
    *("GLOBAL", "STACK_GLOBAL", "INST", "OBJ"),
    *("REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "PERSID", "BINPERSID"),
  )
)
_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_DAMAGE = (
  *(AttributeError, EOFError, KeyError, struct.error),
  pickle.UnpicklingError,
)


class UnsafePickleError(Exception):
  """A pickle asks for something that is not needed to read tensors."""


class Inert:
  """Stands for an object that is not needed; ignores its content."""

  def extend(self, items: Any) -> None:
    """Ignores items of a list."""

  append = extend

  def __setitem__(self, key: Any, value: Any) -> None:
    """Ignores an item of a dict."""


@dataclasses.dataclass(frozen=True, eq=False)
class StandIn:
  """Stands for a class or a function; `build` returns the value of a call."""

  build: Callable[..., Any]


def read_pickle(
  data: bytes, find: Callable[[str, str], Any], persistent: Callable[[Any], Any]
) -> Any:
  """Returns the value that a pickle describes.

  Args:
    find: (module, name) -> a `StandIn`, or a value that cannot be called.
    persistent: persistent id -> value.

  Returns:
    Dicts, lists, tuples, sets and plain values, and values of `find` and
    `persistent`, at most `MAX_DEPTH` deep.

  Raises:
    UnsafePickleError: the pickle uses an opcode that tensors do not need, or
      is larger than any checkpoint.
    ValueError: it is damaged; other errors come from `find` and `persistent`.
  """
  opcodes = _check_opcodes(data)
  try:
    value = _Unpickler(data, opcodes, find, persistent).load()
  except IndexError as error:
    raise ValueError(
      "the pickle uses an empty stack or a mark that is not set"
    ) from error
  except _DAMAGE as error:
    raise ValueError(f"the pickle is damaged: {error}") from error
  _check_size(value)
  return value


def _check_opcodes(data: bytes) -> int:
  """Returns the number of opcodes; checks each of them and its argument."""
  count = 0
  for opcode, argument, _ in pickletools.genops(data):
    count += 1
    if count > MAX_OPCODES:
      raise UnsafePickleError(f"its pickle has over {MAX_OPCODES:,} opcodes")
    if opcode.name not in _OPCODES:
      raise UnsafePickleError(f"its pickle uses the opcode {opcode.name}")
    bits = argument.bit_length() if isinstance(argument, int) else 0
    if bits > _MAX_INTEGER_BITS:
      raise UnsafePickleError(f"its pickle has an integer of {bits:,} bits")
  return count


def _check_size(value: Any) -> None:
  """Checks that traversing a value ends.

  A few bytes describe a list that contains itself, or one of 2^40 values by
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


# Its stubs do not declare the methods of the opcodes.
_Base: Any = pickle._Unpickler


class _Unpickler(_Base):
  """Runs the allowed opcodes; calls nothing but stand-ins."""

  def __init__(
    self,
    data: bytes,
    opcodes: int,
    find: Callable[[str, str], Any],
    persistent: Callable[[Any], Any],
  ) -> None:
    super().__init__(io.BytesIO(data), encoding="utf-8")
    self._work = opcodes
    self._find, self._persistent = find, persistent

  def find_class(self, module: str, name: str) -> Any:
    """Returns the stand-in of a name."""
    if max(len(module), len(name)) > _MAX_NAME:
      raise UnsafePickleError("its pickle has a class without a proper name")
    return self._find(module, name)

  def persistent_load(self, pid: Any) -> Any:
    """Returns the value of a persistent id."""
    return self._persistent(pid)

  def _spend(self, steps: int) -> None:
    """Counts the work of opcodes that process many values."""
    self._work += steps
    if self._work > MAX_OPCODES:
      raise UnsafePickleError(f"its pickle has over {MAX_OPCODES:,} opcodes")

  def _instantiate(self, klass: Any, args: Any) -> None:
    if not isinstance(klass, StandIn):
      raise UnsafePickleError(
        "its pickle calls something that is not a function"
      )
    self._spend(len(args) + sum(len(x) for x in args if isinstance(x, list)))
    self.append(klass.build(*args))

  def _call(self) -> None:
    arguments = self.stack.pop()
    function = self.stack.pop()
    if not isinstance(arguments, tuple):
      raise UnsafePickleError("its pickle calls something without arguments")
    self._instantiate(function, arguments)

  def _call_with_names(self) -> None:
    # No tensor needs keyword arguments.
    self.stack.pop()
    self._call()

  def _build(self) -> None:
    """Fills a namespace; the state of other objects is not needed."""
    state = self.stack.pop()
    holder = self.stack[-1]
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

  def _load_keys(self, name: str, keys: slice) -> None:
    """Runs an opcode that hashes these values of the stack."""
    for key in self.stack[keys]:
      checked_key(key)
    _Base.dispatch[_CODES[name]](self)

  dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
    **{_CODES[x]: _Base.dispatch[_CODES[x]] for x in _OPCODES},
    _CODES["REDUCE"]: _call,
    _CODES["NEWOBJ"]: _call,
    _CODES["NEWOBJ_EX"]: _call_with_names,
    _CODES["BUILD"]: _build,
    _CODES["SETITEM"]: lambda x: x._load_keys("SETITEM", slice(-2, -1)),
    # The stack starts at the last mark.
    _CODES["SETITEMS"]: lambda x: x._load_keys("SETITEMS", slice(0, None, 2)),
    _CODES["DICT"]: lambda x: x._load_keys("DICT", slice(0, None, 2)),
    _CODES["ADDITEMS"]: lambda x: x._load_keys("ADDITEMS", slice(None)),
    _CODES["FROZENSET"]: lambda x: x._load_keys("FROZENSET", slice(None)),
  }


def checked_key(value: Any) -> Any:
  """Returns a value that is quick to hash.

  Raises:
    UnsafePickleError: hashing it may not end.
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
