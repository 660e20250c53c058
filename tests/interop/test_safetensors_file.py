"""The safetensors format, written by hand."""

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
  """Writes a file in the documented format."""
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


def header(text: bytes) -> bytes:
  return struct.pack("<Q", len(text)) + text


def entry(**changes: Any) -> bytes:
  made = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
  return header(json.dumps({"a": made}).encode()) + bytes(8)


_ENTRY = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"123", "header too small"),
    (struct.pack("<Q", 10**12) + b"{}", "header of 1,000,000,000,000 bytes"),
    (entry(shape=[3]), "invalid shape, data type, or offset"),
    (entry(data_offsets=[8, 16]), "invalid offset for tensor `a`"),
    (entry(data_offsets=[-8, 0]), "invalid value: integer `-8`"),
    (entry(data_offsets=[0, 16], shape=[4]), "incomplete|not cover"),
    (entry(dtype="F99"), "F99"),
    (entry(dtype="F8_E4M3", shape=[8]), "a is of type F8_E4M3; known are F16"),
    (entry(shape=[-1, -2]), "invalid value: integer `-1`"),
    (entry(shape=[2.0]), "invalid type: floating point"),
    (entry(shape=[1] * 70 + [2]), "a tensor has 71 axes"),
    (entry(shape=[0, 2**62], data_offsets=[0, 0]), "incomplete|not cover"),
    (header(b'{"a":' + b"[" * 10**6), "recursion limit exceeded"),
    (header(b'{"a":' * 10**6), "recursion limit exceeded"),
    (header(b"[]"), "invalid type: sequence"),
    (header(b'{"\xff": 1}'), "invalid UTF-8"),
    (header(b" " * 2**23 + b"{}"), "header of 8,388,610 bytes"),
    (
      header(b'{"a":%b,"a":%b}' % (_ENTRY, _ENTRY)) + bytes(8),
      'its header contains "a" 2 times$',
    ),
    (
      header(b'{"a":%b}' % _ENTRY.replace(b"}", b',"dtype":"F32"}')) + bytes(8),
      "duplicate field|contains",
    ),
  ],
)
def test_damaged_files(
  tmp_path: pathlib.Path, data: bytes, message: str
) -> None:
  path = tmp_path / "x.safetensors"
  path.write_bytes(data)
  with pytest.raises(
    UserError, match=f"not an undamaged safetensors.*({message})"
  ) as error:
    read_safetensors(path)
  assert len(str(error.value)) < 600


def test_no_such_file(tmp_path: pathlib.Path) -> None:
  with pytest.raises(UserError, match="there is no such file"):
    read_safetensors(tmp_path / "x.safetensors")
