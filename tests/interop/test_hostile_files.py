"""Small files that would use huge memory or time, or block for ever."""

import collections
import contextlib
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narvl_jax.errors import UserError
from narvl_jax.interop import transfer
from narvl_jax.interop.pickle_data import (
  MAX_OPCODES,
  Inert,
  StandIn,
  UnsafePickleError,
  read_pickle,
)
from narvl_jax.interop.source_file import open_source
from narvl_jax.interop.torch_file import read_torch
from narvl_jax.interop.torch_write import write_torch
from tests.interop.states import narvl_state

_MODEL = {"model": {"a": np.arange(6, dtype=np.float32)}}


def _pickle(value: Any) -> bytes:
  return pickle.dumps(value, protocol=2)


def _archive(
  path: pathlib.Path, files: dict[str, bytes], compression: int = 0
) -> pathlib.Path:
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, data in files.items():
      archive.writestr(f"x/{name}", data)
  return path


def _same_list_twice(levels: int) -> bytes:
  """A list that contains one list twice, recursively: 2 ** levels values."""
  twice = b"".join(
    b"](h%ch%ce" % (level, level) + b"q%c" % (level + 1)
    for level in range(levels)
  )
  return b"\x80\x02]q\0" + twice


def _tensor(size: bytes, strides: bytes, start: bytes = b"K\0") -> bytes:
  """A state dict of one tensor over the four numbers of storage 0."""
  storage = (
    b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0"
    b"0X\x03\0\0\0cpuK\x04tQ"
  )
  return (
    b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n("
    + storage
    + start
    + size
    + strides
    + b"\x89ccollections\nOrderedDict\n)RtRs."
  )


_SELF = b"\x80\x02]q\0h\0a"
_HUGE_INT = b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6
_PICKLES = {
  "empty_lists": (b"\x80\x02" + b"]" * (MAX_OPCODES + 1) + b".", "opcodes"),
  "memo_bomb": (b"\x80\x02]r\xff\xff\xff\x7f.", "contains a list"),
  "deep": (b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".", "deeper"),
  "deep_key": (b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"K\1s.", "a large key"),
  "wide_key": (
    b"\x80\x02})q\x000"
    + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(60))
    + b"h\x3cK\1s.",
    "a large key",
  ),
  "doubling": (_same_list_twice(40) + b".", "over 1,048,576 values"),
  "self": (_SELF + b".", "deeper than 100"),
  "self_in_args": (
    b"\x80\x02}(X\x05\0\0\0model}X\x04\0\0\0args" + _SELF[2:] + b"u.",
    "deeper than 100",
  ),
  "repeated_text": (
    b"\x80\x02](X\0\0\x10\0" + b"x" * 2**20 + b"q\0" + b"h\0" * 64 + b"e.",
    "characters",
  ),
  "repeated_state": (
    b"\x80\x02}q\0("
    + b"".join(b"X\4\0\0\0%04dN" % i for i in range(9999))
    + b"ucargparse\nNamespace\n)\x81"
    + b"h\0b" * 2000
    + b".",
    "opcodes",
  ),
  "repeated_call": (
    b"\x80\x02("
    + b"N" * 20000
    + b"tq\0ccollections\nOrderedDict\nq\1"
    + b"0h\1h\0R" * 1000
    + b".",
    "opcodes|OrderedDict|damaged",
  ),
  "list_of_arguments": (
    b"\x80\x02ccollections\nOrderedDict\n]R.",
    "calls something without arguments",
  ),
  "no_function": (b"\x80\x02N)R.", "something that is not a function"),
  "huge_long": (b"\x80\x02" + _HUGE_INT + b".", "integer of 7,"),
  "huge_text_of_int": (b"\x80\x02I" + b"9" * 10**6 + b"\n.", "damaged"),
  "colliding_keys": (_pickle({(2**61 - 1) * i: 0 for i in range(9)}), "large"),
  "no_end": (b"\x80\x02]", "exhausted"),
  "nothing": (b"\x80\x02.", "empty stack"),
  "no_mark": (b"\x80\x02e.", "mark"),
  "not_noted": (b"\x80\x02h\x05.", "not found at index 5"),
  "claimed_text": (b"\x80\x02X\xff\xff\xff\x7fab.", "damaged"),
  "negative_long": (b"\x80\x02\x8b\xff\xff\xff\xff.", "damaged"),
  "long_name": (b"\x80\x02c" + b"o" * 5000 + b"\nx\n.", "proper name"),
  "bad_reference": (_same_list_twice(40) + b"Q.", "not a storage"),
  "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
  "negative_shape": (
    _tensor(b"J\xff\xff\xff\xffJ\xfc\xff\xff\xff\x86", b"K\1K\1\x86"),
    "offset of -1",
  ),
  "float_shape": (
    _tensor(b"G" + struct.pack(">d", 4.0) + b"\x85", b"K\1\x85"),
    "offset of 4.0",
  ),
  "text_shape": (_tensor(b"X\1\0\0\0004\x85", b"K\1\x85"), "offset of str"),
  "no_shape": (_tensor(b"N", b"N"), "without sizes"),
  "beyond_by_stride": (_tensor(b"K\2K\2\x86", b"K\3K\1\x86"), "beyond its st"),
  "beyond_by_offset": (_tensor(b"K\4\x85", b"K\1\x85", b"K\1"), "beyond its"),
  "negative_offset": (
    _tensor(b"K\4\x85", b"K\1\x85", b"J\xff\xff\xff\xff"),
    "offset of -1",
  ),
  "negative_stride": (
    _tensor(b"K\4\x85", b"J\xff\xff\xff\xff\x85", b"K\3"),
    "offset of -1",
  ),
  "more_strides": (_tensor(b"K\4\x85", b"K\1K\1\x86"), "strides"),
  "repeats": (_tensor(b"J\xff\xff\xff\x7f\x85", b"K\0\x85"), "larger than"),
  "many_axes": (
    _tensor(b"(" + b"K\1" * 99 + b"t", b"(" + b"K\1" * 99 + b"t"),
    "99 axes",
  ),
  "empty_but_long": (
    _tensor(b"K\0" + b"\x8a\x09" + b"\0" * 8 + b"\x01\x86", b"K\1K\1\x86"),
    "the shape",
  ),
  "empty": (_tensor(b"K\0K\4\x86", b"K\4K\1\x86"), "contains no values"),
}


@pytest.mark.parametrize("name", _PICKLES)
def test_pickles_end_in_one_line(tmp_path: pathlib.Path, name: str) -> None:
  pickled, message = _PICKLES[name]
  files = {"data.pkl": pickled, "data/0": bytes(16)}
  path = _archive(tmp_path / "x.pt", files)
  with pytest.raises(UserError, match=message) as error:
    transfer.import_official(path, tmp_path / "run")
  text = str(error.value)
  assert text.startswith(f"--from={path}")
  assert "\n" not in text
  assert len(text) < 600
  assert list(tmp_path.iterdir()) == [path]


def test_an_axis_of_one_may_have_any_stride(tmp_path: pathlib.Path) -> None:
  stride = b"\x8a\x09" + b"\0" * 8 + b"\x01"
  pickled = _tensor(b"K\1K\2\x86", stride + b"K\2\x86")
  path = _archive(tmp_path / "x.pt", {"data.pkl": pickled, "data/0": bytes(16)})
  assert np.asarray(open_source(path).state["a"]).shape == (1, 2)


def _numbered(count: int) -> bytes:
  """A state dict of tensors with separate storages."""
  out = b"\x80\x02}("
  for i in range(count):
    key = b"X\4\0\0\0%04d" % i
    storage = (
      b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"X\3\0\0\0cpu"
      b"J\0\0\x04\0tQ"
    )
    out += key + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    out += b"K\0J\0\0\x04\0\x85K\1\x85\x89NtR"
  return out + b"u."


def test_entries_that_overlap(tmp_path: pathlib.Path) -> None:
  """A file of 1 MB that claims a hundred storages of 1 MB."""
  path = tmp_path / "x.pt"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", _numbered(100))
    archive.writestr("x/data/0000", bytes(1 << 20))
    first = archive.getinfo("x/data/0000")
    for i in range(1, 100):
      info = zipfile.ZipInfo(f"x/data/{i:04d}")
      for field in ("header_offset", "CRC", "file_size", "compress_size"):
        setattr(info, field, getattr(first, field))
      archive.filelist.append(info)
      archive.NameToInfo[info.filename] = info
  with pytest.raises(UserError, match="entries of the archive overlap"):
    read_torch(path)


def test_tensors_that_share_their_bytes(tmp_path: pathlib.Path) -> None:
  """Each is valid; reading all would take a hundred times the memory."""
  data = np.arange(1 << 18, dtype=np.float32)
  path = tmp_path / "x.pt"
  write_torch(path, {"model": {f"key{i}": data for i in range(100)}})
  with pytest.raises(
    UserError, match=r"tensors of 104,857,600 bytes in a file"
  ):
    open_source(path)


def test_compressed_archives(tmp_path: pathlib.Path) -> None:
  files = {"data.pkl": b"\x80\x02" + b"]" * 10**7 + b"."}
  path = _archive(tmp_path / "x.pt", files, zipfile.ZIP_DEFLATED)
  with pytest.raises(UserError, match=r"x/data\.pkl is compressed"):
    read_torch(path)
  files = {"data.pkl": _pickle({}), "byteorder": bytes(10**7)}
  path = _archive(tmp_path / "y.pt", files, zipfile.ZIP_DEFLATED)
  with pytest.raises(UserError, match=r"x/byteorder is compressed"):
    read_torch(path)


def test_entries_larger_than_their_content(tmp_path: pathlib.Path) -> None:
  files = {"data.pkl": _pickle({}), "byteorder": bytes(1000)}
  path = _archive(tmp_path / "x.pt", files)
  with pytest.raises(UserError, match=r"x/byteorder has 1,000 bytes"):
    read_torch(path)
  path = _archive(tmp_path / "x.pt", {"data.pkl": b"\x80\x02}."})
  whole = bytearray(path.read_bytes())
  at = whole.index(b"PK\1\2")
  # The sizes in the central directory.
  whole[at + 20 : at + 28] = struct.pack("<II", 10**9, 10**9)
  path.write_bytes(whole)
  with pytest.raises(UserError, match=r"data\.pkl reaches beyond the end"):
    read_torch(path)


def test_a_sparse_pickle(tmp_path: pathlib.Path) -> None:
  """6 GB of zeros that occupy no disk space."""
  path = tmp_path / "x.pt"
  with path.open("wb") as file:
    header = struct.pack("<4s22xHH", b"PK\3\4", len("x/data.pkl"), 0)
    file.write(header + b"x/data.pkl")
    file.truncate(6 * 10**9)
    file.seek(0, 2)
    directory = file.tell()
    extra = struct.pack("<HHQQ", 1, 16, 5 * 10**9, 5 * 10**9)
    entry = struct.pack(
      "<4s4B4HL2L5H2L", b"PK\1\2", 45, 3, 45, 0, 0, 0, 0, 0, 0,
      2**32 - 1, 2**32 - 1, len("x/data.pkl"), len(extra), 0, 0, 0, 0, 0,
    )  # fmt: skip
    file.write(entry + b"x/data.pkl" + extra)
    size = file.tell() - directory
    file.write(
      struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, directory
      )
    )
    file.write(struct.pack("<4sLQL", b"PK\6\7", 0, directory + size, 1))
    file.write(
      struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 2**32 - 1, 0)
    )
  with pytest.raises(UserError, match=r"data\.pkl has 5,000,000,000 bytes"):
    read_torch(path)


def test_a_list_of_entries_without_end(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.pt"
  size = 10**9
  with path.open("wb") as file:
    file.truncate(size)
    file.seek(0, 2)
    file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0))
  with pytest.raises(UserError, match="list of entries has 1,000,000,000 b"):
    read_torch(path)


def _special(path: pathlib.Path, kind: str) -> pathlib.Path:
  if kind == "pipe":
    os.mkfifo(path)
  elif kind == "device":
    path.symlink_to("/dev/zero")
  else:
    path.mkdir()
  return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_no_regular_file(
  tmp_path: pathlib.Path, suffix: str, kind: str
) -> None:
  path = _special(tmp_path / f"x{suffix}", kind)
  with pytest.raises(UserError, match="is a pipe or a device, not a regular"):
    transfer.import_official(path, tmp_path / "run")
  assert list(tmp_path.iterdir()) == [path]


def test_names_that_no_file_can_have() -> None:
  with pytest.raises(UserError, match=r"xx\.pt cannot be read: File name too"):
    open_source("x" * 300 + ".pt")


@pytest.mark.parametrize(
  "value", [10**30, -1, "8192", float("nan"), [1], True, None]
)
def test_counts_of_ids_in_the_settings(
  tmp_path: pathlib.Path, value: Any
) -> None:
  model = types.SimpleNamespace(num_bins=value)
  content = {"model": narvl_state(np.float16), "cfg": {"model": model}}
  write_torch(tmp_path / "x.pt", content)
  if value is None:
    transfer.import_official(tmp_path / "x.pt", tmp_path / "run")
    return
  with pytest.raises(UserError, match=r"num_bins=.*; set --num_codes and"):
    transfer.import_official(tmp_path / "x.pt", tmp_path / "run")
  assert not (tmp_path / "run").exists()


_BOMB = """
import pathlib, resource, sys, zipfile
path = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
  with file.open("x/data.pkl", "w") as entry:
    for _ in range(200):
      entry.write(b"]" * 10**6)
from narvl_jax.interop.torch_file import read_torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
  read_torch(path)
except ValueError as error:
  print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_of_a_small_file(tmp_path: pathlib.Path) -> None:
  """200 million lists in a file of 195 kB took 4.7 GB."""
  path = tmp_path / "x.pt"
  done = subprocess.run(
    [sys.executable, "-c", _BOMB, path],
    capture_output=True,
    text=True,
    check=True,
  )
  message, grown = done.stdout.splitlines()
  assert "x/data.pkl is compressed" in message
  assert path.stat().st_size < 300_000
  assert int(grown) < 100_000  # KiB


def _find(module: str, name: str) -> Any:
  return StandIn(lambda *_: Inert())


_SCALARS = (
  st.none()
  | st.booleans()
  | st.integers(-(2**70), 2**70)
  | st.floats(allow_nan=False)
  | st.text()
  | st.binary(max_size=20)
)
_KEYS = st.text(max_size=5) | st.integers(-(2**40), 2**40)
_VALUES = st.recursive(
  _SCALARS,
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(_KEYS, inner, max_size=4)
    | st.sets(_KEYS, max_size=4)
    | st.frozensets(_KEYS, max_size=4)
  ),
  max_leaves=20,
)


@given(_VALUES, st.integers(0, 5))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
  pickled = pickle.dumps(value, protocol)
  if protocol < 4 and any(x in pickled for x in (b"builtin", b"codecs")):
    return  # Sets and bytes were calls of functions then.
  assert read_pickle(pickled, _find, lambda pid: pid) == value


def test_shared_values_stay_shared() -> None:
  inner = [1]
  value = {"a": inner, "b": (inner, inner)}
  read = read_pickle(_pickle(value), _find, lambda pid: pid)
  assert read["a"] is read["b"][0] is read["b"][1]


# The STRING opcode has the escapes of Python 2.
@pytest.mark.filterwarnings("ignore:invalid escape seq:DeprecationWarning")
@settings(max_examples=300)
@given(st.data())
def test_damaged_pickles_raise_what_is_caught(data: st.DataObject) -> None:
  """Never anything else, such as the end of the process."""
  ordered = collections.OrderedDict(a=[1, (2.5, None)], b={"c": "d"})
  pickled = bytearray(pickle.dumps(ordered, data.draw(st.integers(0, 5))))
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, len(pickled) - 1))
    pickled[at] = data.draw(st.integers(0, 255))
  caught = (UnsafePickleError, ValueError, TypeError, OverflowError)
  with contextlib.suppress(*caught):
    read_pickle(bytes(pickled), _find, lambda pid: Inert())
