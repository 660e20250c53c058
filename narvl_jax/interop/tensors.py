"""Tensors of a file, read one at a time."""

import dataclasses
import math
import os
import zlib
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from narvl_jax.errors import UserError

PathLike = str | os.PathLike[str]
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
  """Bytes of a file and their CRC-32; None where the file has none."""

  offset: int
  size: int
  crc: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A tensor that lies in a file; `np.asarray` reads it.

  Nothing is kept: a model is converted tensor by tensor, so that its file
  never lies in memory as a whole.

  Attributes:
    path: the file.
    offset: of the first byte in the file.
    shape: of the tensor.
    dtype: of the tensor, little endian.
    strides: elements from one index to the next; None: C order.
    entry: the bytes that it is a part of, where the file can tell whether they
      are undamaged.
  """

  path: PathLike
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  strides: tuple[int, ...] | None = None
  entry: Entry | None = None

  @property
  def identity(self) -> Hashable:
    """Equal for tensors that are the same bytes."""
    return (self.path, self.offset, self.shape, self.dtype, self.strides)

  @property
  def nbytes(self) -> int:
    """Bytes of the values."""
    return math.prod(self.shape) * self.dtype.itemsize

  def __setstate__(self, state: Any) -> None:
    """Refuses to become another tensor, as a hostile pickle might ask."""
    raise TypeError("a tensor has no state")

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    """Reads the tensor."""
    del copy  # It is always a new array.
    count = extent(self.shape, self.strides)
    # `fromfile` knows only NumPy's own types.
    raw = np.fromfile(
      self.path, np.uint8, count * self.dtype.itemsize, offset=self.offset
    )
    flat = raw.view(self.dtype)
    if self.strides is None:
      value = flat.reshape(self.shape)
    else:
      # `extent` elements hold all that these strides reach.
      value = np.lib.stride_tricks.as_strided(
        flat, self.shape, [s * self.dtype.itemsize for s in self.strides]
      ).copy()
    return value if dtype is None else value.astype(dtype, copy=False)


# Official key -> a tensor of a file, or an array.
State = Mapping[str, "Tensor | np.ndarray"]


def check_bytes(tensors: Mapping[str, Tensor]) -> None:
  """Compares the bytes of tensors with the check sums of their file.

  Args:
    tensors: name -> tensor; bytes that several share are read once.

  Raises:
    UserError: a tensor is damaged.
  """
  checked: set[Entry] = set()
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
  """Returns the elements from the first to the last one of a tensor."""
  if strides is None or math.prod(shape) == 0:
    return math.prod(shape)
  return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
  """Returns whether a tensor lies in C order without gaps."""
  expected = 1
  for n, stride in zip(reversed(shape), reversed(strides), strict=True):
    if n != 1 and stride != expected:
      return False
    expected *= n
  return True


def same(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> bool:
  """Returns whether two tensors are equal; reads them only if it must."""
  if a is b:
    return True
  if isinstance(a, Tensor) and isinstance(b, Tensor):
    if a.identity == b.identity:
      return True
    if a.shape != b.shape:
      return False
  return np.array_equal(np.asarray(a), np.asarray(b))
