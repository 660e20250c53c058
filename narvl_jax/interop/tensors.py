"""Tensors of a file, read one at a time."""

import dataclasses
import math
import os
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]


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
  """

  path: PathLike
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  strides: tuple[int, ...] | None = None

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
