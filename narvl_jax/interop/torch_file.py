"""Files of `torch.save`, read without torch and without running any of them.

Such a file is a zip archive: a pickle that describes the values, and the bytes
of each storage. A pickle is a program that may call any function of any
module. This reader hands it stand-ins that build nothing but dicts, lists,
namespaces and descriptions of tensors, imports nothing, and refuses all else.
"""

import io
import math
import pickle
import struct
import types
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.interop.tensors import (
  Entry,
  PathLike,
  Tensor,
  contiguous,
  extent,
)

_STORAGES: dict[str, np.dtype[Any]] = {
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "FloatStorage": np.dtype(np.float32),
  "DoubleStorage": np.dtype(np.float64),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ShortStorage": np.dtype(np.int16),
  "CharStorage": np.dtype(np.int8),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}
# Values such as scores and enumerations, which a conversion does not need.
_INERT_PACKAGES = ("numpy", "fairseq", "omegaconf")
_INERT_NAMES = {
  ("torch", "Size"),
  ("torch", "device"),
  ("_codecs", "encode"),
  *(("torch", f"float{bits}") for bits in (16, 32, 64)),
}
_MAX_PICKLE_BYTES = 1 << 28
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class _UnsafePickleError(Exception):
  """A pickle asks for something that is not needed to read tensors."""


class Inert:
  """What stands for an object that is not needed; remembers nothing."""

  def __init__(self, *_: Any, **__: Any) -> None:
    """Takes whatever the file passes."""

  def __setstate__(self, state: Any) -> None:
    """Forgets it."""


def read_torch(path: PathLike) -> Any:
  """Reads what `torch.save` wrote, in the zip format of torch >= 1.6.

  Args:
    path: the file.

  Returns:
    Dicts, lists and plain values as they were; a `Tensor` for each tensor, a
    `types.SimpleNamespace` for each `argparse.Namespace`, an `Inert` for
    objects of NumPy, fairseq and omegaconf.

  Raises:
    UserError: the file is missing, damaged, of another format, or its pickle
      asks to run code.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      return _Reader(path, archive).read()
  except FileNotFoundError as error:
    raise UserError(f"--from={path}: there is no such file") from error
  except zipfile.BadZipFile as error:
    raise UserError(
      f"--from={path} is no zip archive, so it is damaged or was written by"
      " torch < 1.6; in the latter case read and save it with a newer torch:"
      f' torch.save(torch.load("{path}", weights_only=True),'
      ' "NEW.pt")'
    ) from error
  except OSError as error:
    raise UserError(f"--from={path} cannot be read: {error}") from error
  except _UnsafePickleError as error:
    raise UserError(
      f"--from={path} is refused: {error}; convert only files that hold"
      " nothing but tensors and settings"
    ) from error
  except UserError:
    raise
  except Exception as error:
    # A damaged pickle can raise nearly anything.
    raise UserError(
      f"--from={path} is damaged: {type(error).__name__}: {error}"
    ) from error


class _Reader:
  """One archive that is being read."""

  def __init__(self, path: PathLike, archive: zipfile.ZipFile) -> None:
    self._path = path
    self._archive = archive
    self._file = archive.fp
    self._entries = {info.filename: info for info in archive.infolist()}
    for info in self._entries.values():
      # torch writes 0 where it was told to compute none.
      info.CRC = info.CRC or None  # pyright: ignore[reportAttributeAccessIssue]
    self._offsets: dict[str, int] = {}
    names = [name for name in self._entries if name.endswith("/data.pkl")]
    if len(names) != 1:
      raise UserError(
        f"--from={path} is a zip archive but not of torch.save: it holds"
        f" {len(names)} files data.pkl, not 1"
      )
    self._pickle = names[0]
    self._root = names[0].removesuffix("data.pkl")

  def read(self) -> Any:
    """Returns the content of the archive."""
    order = self._entries.get(self._root + "byteorder")
    if order is not None and self._archive.read(order) != b"little":
      raise UserError(
        f"--from={self._path} was written on a big endian machine; save it"
        " again on a little endian one"
      )
    info = self._entries[self._pickle]
    if info.file_size > _MAX_PICKLE_BYTES:
      raise _UnsafePickleError(f"its pickle has {info.file_size:,} bytes")
    try:
      # All of it, as only then its check sum is compared.
      pickled = io.BytesIO(self._archive.read(info))
    except zipfile.BadZipFile as error:
      raise UserError(
        f"--from={self._path} is damaged: {error}; download or copy it again"
      ) from error
    # The classes are new for each file: what it does to them ends with it.
    return _Unpickler(pickled, _globals(), self._storage).load()

  def _storage(self, reference: Any) -> "_Storage":
    """Finds the bytes that a persistent id of the pickle stands for."""
    kind, of_type, key, _, count = reference
    if kind != "storage" or not isinstance(of_type, _StorageType):
      raise _UnsafePickleError(f"it refers to {kind!r}, not to a storage")
    dtype, count = of_type.dtype, int(count)
    name = f"{self._root}data/{key}"
    info = self._entries.get(name)
    if info is None:
      raise ValueError(f"the storage {name} is missing")
    if info.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f"the storage {name} is compressed")
    if info.file_size < count * dtype.itemsize:
      raise ValueError(f"the storage {name} is cut short")
    if name not in self._offsets:
      self._offsets[name] = self._data_offset(info)
    entry = Entry(self._offsets[name], info.file_size, info.CRC)
    return _Storage(self._path, entry, count, dtype)

  def _data_offset(self, info: zipfile.ZipInfo) -> int:
    """Returns where the bytes of an entry start in the file."""
    assert self._file is not None
    self._file.seek(info.header_offset)
    header = self._file.read(_LOCAL_HEADER.size)
    signature, name, extra = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
      raise ValueError(f"the entry {info.filename} is not where it should be")
    return info.header_offset + _LOCAL_HEADER.size + name + extra


class _NoState:
  """Cannot be changed by a pickle after it was made."""

  def __setstate__(self, state: Any) -> None:
    raise _UnsafePickleError("its pickle wants to change a tensor")


class _StorageType(_NoState):
  """Stands for a class such as `torch.FloatStorage`."""

  def __init__(self, dtype: np.dtype[Any]) -> None:
    self.dtype = dtype


class _Storage(_NoState):
  """Bytes of a file, of which tensors are views."""

  def __init__(
    self, path: PathLike, entry: Entry, count: int, dtype: np.dtype[Any]
  ) -> None:
    self.path, self.entry = path, entry
    self.count, self.dtype = count, dtype


def _rebuild_tensor(
  storage: Any, start: int, size: Any, strides: Any, *_: Any
) -> Tensor:
  """Stands for `torch._utils._rebuild_tensor_v2`."""
  if not isinstance(storage, _Storage):
    raise _UnsafePickleError("a tensor without a storage")
  shape, steps = tuple(map(int, size)), tuple(map(int, strides))
  if min((start, *shape, *steps)) < 0 or len(shape) != len(steps):
    raise ValueError(f"a tensor of shape {shape} and strides {steps}")
  if start + extent(shape, steps) > storage.count:
    raise ValueError("a tensor reaches beyond its storage")
  # Repeats of a few bytes could else fill the memory.
  if math.prod(shape) > storage.count:
    raise ValueError("a tensor is larger than its storage")
  return Tensor(
    storage.path,
    storage.entry.offset + start * storage.dtype.itemsize,
    shape,
    storage.dtype,
    None if contiguous(shape, steps) else steps,
    storage.entry,
  )


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
  """Stands for `torch._utils._rebuild_parameter`."""
  return tensor


def _globals() -> Callable[[str, str], Any]:
  """Returns a function that finds the stand-in of a name."""
  namespace = type("Namespace", (types.SimpleNamespace,), {})
  ordered = type("OrderedDict", (dict,), {})
  inert = type("Inert", (Inert,), {})
  known = {
    ("argparse", "Namespace"): namespace,
    ("collections", "OrderedDict"): ordered,
    ("torch._utils", "_rebuild_tensor_v2"): lambda *a: _rebuild_tensor(*a),
    ("torch._utils", "_rebuild_parameter"): lambda *a: _rebuild_parameter(*a),
    **{("torch", name): _StorageType(x) for name, x in _STORAGES.items()},
  }

  def find(module: str, name: str) -> Any:
    if (module, name) in known:
      return known[module, name]
    package = module.split(".")[0]
    if package in _INERT_PACKAGES or (module, name) in _INERT_NAMES:
      return inert
    raise _UnsafePickleError(f"its pickle wants to use {module}.{name}")

  return find


class _Unpickler(pickle.Unpickler):
  """Builds what the stand-ins build."""

  def __init__(
    self,
    file: Any,
    find: Callable[[str, str], Any],
    storage: Callable[[Any], _Storage],
  ) -> None:
    super().__init__(file, encoding="utf-8")
    self._find, self._storage = find, storage

  def find_class(self, module_name: str, global_name: str) -> Any:
    """Never imports."""
    return self._find(module_name, global_name)

  def persistent_load(self, pid: Any) -> _Storage:
    """Returns the storage that a tensor refers to."""
    return self._storage(pid)
