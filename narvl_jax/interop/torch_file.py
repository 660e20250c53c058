"""Files of `torch.save`, read without torch and without running any code.

Such a file is a zip archive of a pickle that describes the values, and the
bytes of each storage. `pickle_data` reads the pickle as data. Its names stand
for dicts, namespaces and descriptions of tensors; all others are rejected.
"""

import collections
import dataclasses
import io
import itertools
import math
import os
import struct
import types
import zipfile
import zlib
from typing import Any

import ml_dtypes
import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.interop.pickle_data import (
  Inert,
  StandIn,
  UnsafePickleError,
  checked_key,
  read_pickle,
)
from narvl_jax.interop.tensors import (
  MAX_AXES,
  PathLike,
  Slice,
  StoredBytes,
  Tensor,
  check_regular,
  check_shape,
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
# Packages of values that a conversion does not need, such as scores.
_INERT_PACKAGES = ("numpy", "fairseq", "omegaconf")
_INERT_NAMES = {
  ("torch", "Size"),
  ("torch", "device"),
  ("_codecs", "encode"),
  *(("torch", f"float{bits}") for bits in (16, 32, 64)),
}
_MAX_PICKLE_BYTES = 1 << 26
# Largest size of the central directory; 2,000 entries need 0.2 MB.
_MAX_DIRECTORY_BYTES = 1 << 22
_MAX_BYTE_ORDER_BYTES = 16
_MAX_KEY_CHARACTERS = 100
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def read_torch(path: PathLike) -> Any:
  """Reads a file of `torch.save` in the zip format of torch >= 1.6.

  Returns:
    Dicts, lists and plain values; a `Tensor` for each tensor, a
    `types.SimpleNamespace` for each `argparse.Namespace`, an `Inert` for
    objects of NumPy, fairseq and omegaconf.

  Raises:
    UserError: the file is missing, damaged or of another format, or its pickle
      asks to run code.
  """
  check_regular(path)
  try:
    with _CappedFile(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
      return _Reader(path, file, archive.infolist()).read()
  except zipfile.BadZipFile as error:
    raise UserError(
      f"--from={path} is not a zip archive, so it is damaged or was written by"
      " torch < 1.6; in the latter case read and save it with a newer torch:"
      f' torch.save(torch.load("{path}", weights_only=True),'
      ' "NEW.pt")'
    ) from error
  except OSError as error:
    raise UserError(
      f"--from={path} cannot be read: {error.strerror or error}"
    ) from error
  except UnsafePickleError as error:
    raise UserError(
      f"--from={path} is rejected: {error}; convert only files that contain"
      " nothing but tensors and settings"
    ) from error
  except UserError:
    raise
  except Exception as error:
    # A damaged file can raise nearly any exception.
    raise UserError(
      f"--from={path} is damaged: {type(error).__name__}: {error}"
    ) from error


class _CappedFile(io.BufferedReader):
  """A file of which `zipfile` cannot read a huge central directory."""

  def read(self, size: int | None = -1, /) -> bytes:
    """Limits the size."""
    if size is None or size < 0:
      size = os.fstat(self.fileno()).st_size - self.tell()
    if size > _MAX_DIRECTORY_BYTES:
      raise ValueError(f"its list of entries has {size:,} bytes")
    return super().read(size)


class _Reader:
  """One archive that is being read."""

  def __init__(
    self, path: PathLike, file: _CappedFile, entries: list[zipfile.ZipInfo]
  ) -> None:
    self._path = path
    self._file = file
    self._size = os.fstat(file.fileno()).st_size
    self._entries = {info.filename: info for info in entries}
    self._used: dict[str, StoredBytes] = {}
    counts = collections.Counter(info.filename for info in entries)
    names = [x for x in counts.elements() if x.endswith("/data.pkl")]
    if len(names) != 1:
      raise UserError(
        f"--from={path} is a zip archive but not of torch.save: it contains"
        f" {len(names)} files data.pkl, not 1"
      )
    name, count = counts.most_common(1)[0]
    if count > 1:
      raise ValueError(f"the archive contains {name} {count} times")
    self._pickle = names[0]
    self._root = names[0].removesuffix("data.pkl")

  def read(self) -> Any:
    order = self._root + "byteorder"
    little = order not in self._entries or (
      self._bytes(order, _MAX_BYTE_ORDER_BYTES) == b"little"
    )
    if not little:
      raise UserError(
        f"--from={self._path} was written on a big endian machine; save it"
        " again on a little endian one"
      )
    data = self._bytes(self._pickle, _MAX_PICKLE_BYTES)
    value = read_pickle(data, _find, self._storage)
    self._check_overlaps()
    return value

  def _bytes(self, name: str, most: int) -> bytes:
    entry = self._entry(name)
    if entry.size > most:
      raise UnsafePickleError(f"{name} has {entry.size:,} bytes")
    # Not `self._file.read`, which is capped.
    data = os.pread(self._file.fileno(), entry.size, entry.offset)
    if entry.crc is not None and zlib.crc32(data) != entry.crc:
      raise UserError(
        f"--from={self._path} is damaged: the bytes of {name} do not have their"
        " check sum (CRC-32); download or copy it again"
      )
    return data

  def _entry(self, name: str) -> StoredBytes:
    """Returns the location of an entry; raises ValueError for a bad one."""
    if name in self._used:
      return self._used[name]
    info = self._entries[name]
    # torch never compresses, and a compressed entry may expand without end.
    if info.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f"{name} is compressed")
    header = os.pread(
      self._file.fileno(), _LOCAL_HEADER.size, info.header_offset
    )
    signature, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
      raise ValueError(f"{name} is not where it should be")
    offset = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    if offset + info.file_size > self._size:
      raise ValueError(f"{name} reaches beyond the end of the file")
    # torch writes 0 if it was configured to compute no checksums.
    self._used[name] = StoredBytes(offset, info.file_size, info.CRC or None)
    return self._used[name]

  def _check_overlaps(self) -> None:
    """Raises if two entries share bytes: a small file could seem huge."""
    entries = sorted(
      (entry.offset, entry.size) for entry in self._used.values() if entry.size
    )
    for (offset, size), (following, _) in itertools.pairwise(entries):
      if offset + size > following:
        raise ValueError("entries of the archive overlap")

  def _storage(self, reference: Any) -> "_Storage":
    """Returns the bytes of a storage, given a persistent id of the pickle."""
    if not isinstance(reference, tuple) or len(reference) != 5:
      raise UnsafePickleError("it refers to something that is not a storage")
    kind, of_type, key, _, count = reference
    if kind != "storage" or not isinstance(of_type, _StorageType):
      raise UnsafePickleError("it refers to something that is not a storage")
    if not isinstance(key, str) or len(key) > _MAX_KEY_CHARACTERS:
      raise ValueError("a storage has no proper name")
    (count,) = _naturals([count])
    name = f"{self._root}data/{key}"
    if name not in self._entries:
      raise ValueError(f"the storage {name} is missing")
    entry = self._entry(name)
    if entry.size < count * of_type.dtype.itemsize:
      raise ValueError(f"the storage {name} is cut short")
    return _Storage(self._path, entry, count, of_type.dtype)


# Not tuples, which a pickle could unpack.
@dataclasses.dataclass(frozen=True, eq=False)
class _StorageType:
  """Stands for a class such as `torch.FloatStorage`."""

  dtype: np.dtype[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
  """Bytes of a file, of which tensors are views."""

  path: PathLike
  entry: StoredBytes
  count: int
  dtype: np.dtype[Any]


def _naturals(values: Any) -> tuple[int, ...]:
  """Returns a tuple of integers >= 0; rejects anything else."""
  if not isinstance(values, (list, tuple)):
    raise ValueError("a tensor without sizes or strides")
  if len(values) > MAX_AXES:
    raise ValueError(f"a tensor has {len(values):,} axes")
  for value in values:
    if type(value) is not int or value < 0:
      shown = value if isinstance(value, (int, float)) else type(value).__name__
      raise ValueError(f"a tensor has a size, stride or offset of {shown}")
  return tuple(values)


def _rebuild_tensor(
  storage: Any, start: int, size: Any, strides: Any, *_: Any
) -> Tensor:
  """Stands for `torch._utils._rebuild_tensor_v2`."""
  if not isinstance(storage, _Storage):
    raise UnsafePickleError("a tensor without a storage")
  shape, steps = _naturals(size), _naturals(strides)
  check_shape(shape)
  (start,) = _naturals([start])
  if len(shape) != len(steps):
    raise ValueError(f"a tensor of shape {shape} and strides {steps}")
  if start + extent(shape, steps) > storage.count:
    raise ValueError("a tensor reaches beyond its storage")
  # Otherwise strides of 0 could repeat a few bytes without end.
  if math.prod(shape) > storage.count:
    raise ValueError("a tensor is larger than its storage")
  return Slice(
    storage.path,
    shape,
    storage.dtype,
    storage.entry,
    storage.entry.offset + start * storage.dtype.itemsize,
    None if contiguous(shape, steps) else steps,
  )


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
  """Stands for `torch._utils._rebuild_parameter`."""
  return tensor


def _ordered_dict(items: Any = (), *_: Any) -> dict[Any, Any]:
  """Stands for `collections.OrderedDict`."""
  pairs = [tuple(pair) for pair in items if isinstance(pair, (list, tuple))]
  return {checked_key(key): value for key, value in pairs}


_INERT = StandIn(lambda *_: Inert())
_KNOWN = {
  ("argparse", "Namespace"): StandIn(lambda *_: types.SimpleNamespace()),
  ("collections", "OrderedDict"): StandIn(_ordered_dict),
  ("torch._utils", "_rebuild_tensor_v2"): StandIn(_rebuild_tensor),
  ("torch._utils", "_rebuild_parameter"): StandIn(_rebuild_parameter),
  **{("torch", name): _StorageType(x) for name, x in _STORAGES.items()},
}


def _find(module: str, name: str) -> Any:
  """Returns the stand-in for a name of the pickle."""
  if (module, name) in _KNOWN:
    return _KNOWN[module, name]
  package = module.split(".")[0]
  if package in _INERT_PACKAGES or (module, name) in _INERT_NAMES:
    return _INERT
  raise UnsafePickleError(f"its pickle wants to use {module}.{name}")
