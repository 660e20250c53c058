"""Files in the safetensors format: a JSON header, then the bytes.

The format is read here, not by its own package, which maps a whole file into
memory and has no bfloat16 for NumPy.
"""

import json
import math
import struct
from typing import Any

import ml_dtypes
import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.interop.tensors import PathLike, Tensor

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
_MAX_HEADER_BYTES = 100_000_000  # As in the format's own readers.


def read_safetensors(path: PathLike) -> dict[str, Tensor]:
  """Returns the tensors of a file by their names.

  Raises:
    UserError: the file is missing or damaged.
  """
  try:
    with open(path, "rb") as file:
      size = file.seek(0, 2)
      file.seek(0)
      (length,) = struct.unpack("<Q", file.read(8))
      if length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"its header of {length:,} bytes is not in it")
      header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
      name: _tensor(path, name, entry, 8 + length, size)
      for name, entry in header.items()
    }
  except FileNotFoundError as error:
    raise UserError(f"--from={path}: there is no such file") from error
  except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
    raise UserError(
      f"--from={path} is no undamaged safetensors file: {error}"
    ) from error


def _tensor(
  path: PathLike, name: str, entry: dict[str, Any], start: int, size: int
) -> Tensor:
  dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
  first, last = entry["data_offsets"]
  if last - first != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"the bytes of {name} do not fit its shape")
  if not 0 <= first <= last <= size - start:
    raise ValueError(f"{name} reaches beyond the end")
  return Tensor(path, start + first, shape, dtype)
