"""Tensors in a file, read one at a time."""

import abc
import dataclasses
import math
import os
import stat
import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from narvl_jax.errors import UserError

PathLike = str | os.PathLike[str]
_CHUNK_BYTES = 1 << 20
# No more than NumPy allows.
MAX_AXES = 32
_MAX_ELEMENTS = 1 << 40


@dataclasses.dataclass(frozen=True)
class StoredBytes:
  """Bytes of a file and their CRC-32; None where the file has none."""

  offset: int
  size: int
  crc: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor(abc.ABC):
  """A tensor in a file; `np.asarray` reads it and caches nothing.

  Attributes:
    dtype: dtype in the file, little endian.
    entry: the bytes that contain it, if the file has a checksum of them.
  """

  path: PathLike
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  entry: StoredBytes | None

  @property
  @abc.abstractmethod
  def identity(self) -> Hashable:
    """Equal for tensors of the same bytes."""

  @property
  def nbytes(self) -> int:
    """Size of the values."""
    return math.prod(self.shape) * self.dtype.itemsize

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    """Reads the tensor.

    Raises:
      UserError: the file has changed or cannot be read.
    """
    del copy  # The array is always new.
    try:
      value = self._read()
    except (OSError, ValueError) as error:
      raise UserError(
        f"--from={self.path} cannot be read: {error}; did it change meanwhile?"
      ) from error
    return value if dtype is None else value.astype(dtype, copy=False)

  @abc.abstractmethod
  def _read(self) -> np.ndarray:
    """Reads the values from the file."""


@dataclasses.dataclass(frozen=True, eq=False)
class Slice(Tensor):
  """A tensor at an offset of a file.

  Attributes:
    offset: offset of the first byte in the file.
    strides: elements from one index to the next; None: C order.
  """

  offset: int
  strides: tuple[int, ...] | None

  @property
  def identity(self) -> Hashable:
    """See `Tensor`."""
    return (self.path, self.offset, self.shape, self.dtype, self.strides)

  def _read(self) -> np.ndarray:
    count = extent(self.shape, self.strides)
    # `fromfile` does not know bfloat16.
    raw = np.fromfile(
      self.path, np.uint8, count * self.dtype.itemsize, offset=self.offset
    )
    if raw.size < count * self.dtype.itemsize:
      raise ValueError("it is shorter than it was")
    flat = raw.view(self.dtype)
    if self.strides is None:
      return flat.reshape(self.shape)
    # The stride of an axis of one element is unused, and may be larger than
    # NumPy allows.
    steps = [
      stride * self.dtype.itemsize if n > 1 else 0
      for n, stride in zip(self.shape, self.strides, strict=True)
    ]
    return np.lib.stride_tricks.as_strided(flat, self.shape, steps).copy()


# Official key -> a tensor of a file, or an array.
State = Mapping[str, "Tensor | np.ndarray"]


def check_regular(path: PathLike) -> None:
  """Raises UserError unless a path is a regular file."""
  try:
    mode = os.stat(path).st_mode
  except FileNotFoundError as error:
    raise UserError(f"--from={path}: there is no such file") from error
  except OSError as error:
    raise UserError(
      f"--from={path} cannot be read: {error.strerror}"
    ) from error
  if not stat.S_ISREG(mode):
    kind = "folder" if stat.S_ISDIR(mode) else "pipe or a device"
    raise UserError(
      f"--from={path} is a {kind}, not a regular file; copy the weights to a"
      " file and name that"
    )


def check_shape(shape: Sequence[Any]) -> None:
  """Raises ValueError for a shape that NumPy does not support."""
  if len(shape) > MAX_AXES:
    raise ValueError(f"a tensor has {len(shape):,} axes")
  sizes = [n for n in shape if isinstance(n, int) and n > 0]
  if math.prod(sizes) > _MAX_ELEMENTS:
    raise ValueError(f"a tensor has the shape {list(sizes)}")


def check_bytes(tensors: Mapping[str, Tensor]) -> None:
  """Compares the bytes of tensors with the checksums of their file.

  Args:
    tensors: name -> tensor; shared bytes are read once.

  Raises:
    UserError: a tensor is damaged.
  """
  checked: set[StoredBytes] = set()
  for name, tensor in tensors.items():
    entry = tensor.entry
    if entry is None or entry.crc is None or entry in checked:
      continue
    checked.add(entry)
    crc, left = 0, entry.size
    with open(tensor.path, "rb") as file:
      file.seek(entry.offset)
      while left and (data := file.read(min(left, _CHUNK_BYTES))):
        crc, left = zlib.crc32(data, crc), left - len(data)
    if left or crc != entry.crc:
      raise UserError(
        f"--from={tensor.path} is damaged: the bytes of {name} do not have"
        " their check sum (CRC-32); download or copy it again"
      )


def extent(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> int:
  """Returns the number of elements from the first to the last one."""
  if strides is None or math.prod(shape) == 0:
    return math.prod(shape)
  return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
  """Returns whether strides are those of C order."""
  expected = 1
  for n, stride in zip(reversed(shape), reversed(strides), strict=True):
    if n != 1 and stride != expected:
      return False
    expected *= n
  return True


def same(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> bool:
  """Returns whether two tensors are equal; reads them only if needed."""
  if a is b:
    return True
  if isinstance(a, Tensor) and isinstance(b, Tensor):
    if a.identity == b.identity:
      return True
    if a.shape != b.shape:
      return False
  return np.array_equal(np.asarray(a), np.asarray(b))
