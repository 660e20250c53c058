"""Files in the format of `torch.save`, written without torch."""

import struct
import types
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from narvl_jax.files.disk import atomically
from narvl_jax.files.stores import as_path
from narvl_jax.interop.tensors import PathLike, Tensor

_STORAGES = {
  np.dtype(np.float16): b"HalfStorage",
  np.dtype(ml_dtypes.bfloat16): b"BFloat16Storage",
  np.dtype(np.float32): b"FloatStorage",
  np.dtype(np.float64): b"DoubleStorage",
  np.dtype(np.int64): b"LongStorage",
}
# torch can map storages into memory if they are aligned to it.
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_PADDING_FIELD = 0x4246  # "FB", as torch names its padding.


def write_torch(path: PathLike, content: Mapping[str, Any]) -> None:
  """Writes a file for `torch.load`, atomically.

  Args:
    content: dicts, lists, tuples, str, int, float, bool, None,
      `types.SimpleNamespace` (becomes an `argparse.Namespace`), arrays and
      `Tensor`s. An array that appears twice is written once and stays shared.

  Raises:
    TypeError: a value of another type.
  """
  target = as_path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  pickler = _Pickler()
  pickled = pickler.dump(content)
  with (
    atomically(target) as part,
    zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive,
  ):
    root = target.stem
    _write(archive, f"{root}/data.pkl", pickled)
    _write(archive, f"{root}/byteorder", b"little")
    for key, value in enumerate(pickler.storages):
      data = np.ascontiguousarray(np.asarray(value))
      _write(
        archive, f"{root}/data/{key}", data.reshape(-1).view(np.uint8).data
      )
    _write(archive, f"{root}/version", b"3\n")


def _write(
  archive: zipfile.ZipFile, name: str, data: bytes | memoryview
) -> None:
  """Adds an entry whose bytes start at a multiple of the alignment."""
  info = zipfile.ZipInfo(name)  # A fixed date: equal content, equal bytes.
  assert archive.fp is not None
  start = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(name) + 4
  padding = -start % _ALIGNMENT
  info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + b"\0" * padding
  archive.writestr(info, data)  # pyright: ignore[reportArgumentType]


class _Pickler:
  """Writes pickles of protocol 2 that name torch without importing it."""

  def __init__(self) -> None:
    self.storages: list[Tensor | np.ndarray] = []
    self._keys: dict[Any, int] = {}

  def dump(self, value: Any) -> bytes:
    """Returns the pickle of a value."""
    return b"\x80\x02" + self._value(value) + b"."

  def _value(self, value: Any) -> bytes:
    if value is None:
      return b"N"
    if isinstance(value, bool):
      return b"\x88" if value else b"\x89"
    if isinstance(value, int):
      return self._integer(value)
    if isinstance(value, float):
      return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
      text = value.encode("utf-8", "surrogatepass")
      return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, (Tensor, np.ndarray)):
      return self._tensor(value)
    if isinstance(value, types.SimpleNamespace):
      new = b"cargparse\nNamespace\n)\x81"
      return new + self._value(vars(value)) + b"b"
    if isinstance(value, Mapping):
      items = (self._value(x) for pair in value.items() for x in pair)
      return b"}(" + b"".join(items) + b"u"
    if isinstance(value, (list, tuple)):
      items = b"".join(map(self._value, value))
      return (
        b"(" + items + b"t"
        if isinstance(value, tuple)
        else (b"](" + items + b"e")
      )
    raise TypeError(f"{type(value).__name__} has no place in such a file")

  def _integer(self, value: int) -> bytes:
    if -(2**31) <= value < 2**31:
      return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)

  def _tensor(self, value: Tensor | np.ndarray) -> bytes:
    identity = value.identity if isinstance(value, Tensor) else id(value)
    if identity not in self._keys:
      self._keys[identity] = len(self.storages)
      self.storages.append(value)
    key, count = self._keys[identity], 1
    strides: list[int] = []
    for n in reversed(value.shape):
      strides.insert(0, count)
      count *= n
    storage = (
      b"("
      + self._value("storage")
      + b"ctorch\n"
      + _STORAGES[value.dtype]
      + b"\n"
      + b"".join(map(self._value, (str(key), "cpu", count)))
      + b"tQ"
    )
    rest = map(self._value, (0, tuple(value.shape), tuple(strides), False))
    return (
      b"ctorch._utils\n_rebuild_tensor_v2\n("
      + storage
      + b"".join(rest)
      + b"ccollections\nOrderedDict\n)RtR"
    )
