"""Files in the safetensors format."""

import collections
import dataclasses
import json
import os
import struct
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from narvl_jax.errors import UserError
from narvl_jax.interop.tensors import (
  PathLike,
  Tensor,
  check_regular,
  check_shape,
)

_DTYPES: dict[str, np.dtype[Any]] = {
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
# The library allows 100 MB, which takes much more memory to parse. The header
# of 2,000 tensors has 0.2 MB.
_MAX_HEADER_BYTES = 1 << 23


def read_safetensors(path: PathLike) -> dict[str, Tensor]:
  """Returns name -> tensor of a file.

  Raises:
    UserError: the file is missing or damaged, or names a tensor twice.
  """
  check_regular(path)
  try:
    header = _read_header(path)
    with _open(path) as file:
      # The library would use the last of two equal names.
      json.loads(header, object_pairs_hook=_check_unique)
      names: list[str] = file.keys()
      return {name: _tensor(path, file, name) for name in names}
  except (OSError, ValueError) as error:
    raise UserError(
      f"--from={path} is not an undamaged safetensors file: {error}"
    ) from error


def _read_header(path: PathLike) -> bytes:
  with open(path, "rb") as file:
    start = file.read(8)
    if len(start) < 8:
      return b""  # The library reports it.
    (length,) = struct.unpack("<Q", start)
    if length > _MAX_HEADER_BYTES:
      raise ValueError(f"it claims a header of {length:,} bytes")
    return file.read(length)


def _check_unique(items: list[tuple[str, Any]]) -> None:
  name, count = collections.Counter(x for x, _ in items).most_common(1)[0]
  if count > 1:
    raise ValueError(f'its header contains "{name[:100]}" {count} times')


@contextmanager
def _open(path: PathLike) -> Iterator[Any]:
  """Opens a file; errors of the library become `ValueError`."""
  try:
    # Mapped pages (the default) would count as memory of this process.
    with safetensors.safe_open(
      os.fspath(path), framework="numpy", backend="pread"
    ) as file:
      yield file
  except safetensors.SafetensorError as error:
    raise ValueError(str(error)) from error


def _tensor(path: PathLike, file: Any, name: str) -> Tensor:
  view = file.get_slice(name)
  dtype, shape = view.get_dtype(), view.get_shape()
  if dtype not in _DTYPES:
    raise ValueError(
      f"{name} is of type {dtype}; known are {', '.join(_DTYPES)}"
    )
  check_shape(shape)
  return _Named(path, tuple(shape), _DTYPES[dtype], None, name)


@dataclasses.dataclass(frozen=True, eq=False)
class _Named(Tensor):
  """A tensor that the library reads by its name."""

  name: str

  @property
  def identity(self) -> Hashable:
    """See `Tensor`."""
    return (self.path, self.name)

  def _read(self) -> np.ndarray:
    # Opened for each tensor: an open file caches what was read.
    with _open(self.path) as file:
      return file.get_tensor(self.name)
