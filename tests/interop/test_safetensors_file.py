"""The safetensors format, written out by hand."""

import json
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.interop.safetensors_file import read_safetensors

_NAMES = {
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
  "int64": "I64",
}


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes a file as the format's description says."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  data = b""
  for name, value in tensors.items():
    start, data = len(data), data + value.tobytes()
    header[name] = {
      "dtype": _NAMES[value.dtype.name],
      "shape": list(value.shape),
      "data_offsets": [start, len(data)],
    }
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_tensors(tmp_path: pathlib.Path) -> None:
  tensors = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(3).astype(ml_dtypes.bfloat16),
    "c": np.array(5),
    "d": np.zeros((0, 2), np.float16),
  }
  write(tmp_path / "x.safetensors", tensors)
  read = read_safetensors(tmp_path / "x.safetensors")
  assert read.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(np.asarray(read[name]), value, strict=True)


def entry(**changes: Any) -> bytes:
  made = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
  text = json.dumps({"a": made}).encode()
  return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"123", "unpack"),
    (struct.pack("<Q", 10**12) + b"{}", "header of 1,000,000,000,000 bytes"),
    (entry(shape=[3]), "the bytes of a do not fit its shape"),
    (entry(data_offsets=[8, 16]), "a reaches beyond the end"),
    (entry(data_offsets=[-8, 0]), "a reaches beyond the end"),
    (entry(dtype="F99"), "F99"),
  ],
)
def test_damaged_files(
  tmp_path: pathlib.Path, data: bytes, message: str
) -> None:
  path = tmp_path / "x.safetensors"
  path.write_bytes(data)
  with pytest.raises(UserError, match=f"no undamaged safetensors.*{message}"):
    read_safetensors(path)


def test_no_such_file(tmp_path: pathlib.Path) -> None:
  with pytest.raises(UserError, match="there is no such file"):
    read_safetensors(tmp_path / "x.safetensors")
