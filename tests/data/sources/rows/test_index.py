"""The index of rows: built once, kept, and built again when it is stale."""

import io
import logging
import multiprocessing
import os
import pathlib
import pickle
import shutil
import tracemalloc
from typing import Any

import numpy as np
import pytest

from narvl_jax.data.sources import content
from narvl_jax.data.sources.rows import index as row_index
from narvl_jax.data.sources.rows import opened
from narvl_jax.data.sources.rows.files import RowFile
from narvl_jax.errors import UserError
from tests.data.sources.rows.row_files import index_of, rewrite


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
  builds: list[int] = []
  build = row_index._build

  def counted(*arguments):
    builds.append(1)
    return build(*arguments)

  monkeypatch.setattr(row_index, "_build", counted)
  return builds


def test_index_is_built_once(
  path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  builds = count_builds(monkeypatch)
  path.write_bytes(b"a\nb\n")
  RowFile(path)
  assert list(RowFile(path)) == [b"a", b"b"]
  assert len(builds) == 1
  assert sorted(os.listdir(path.parent)) == ["rows.tsv", "rows.tsv.rows.idx"]
  # Only the time of change distinguishes these.
  path.write_bytes(b"a\n\nb")
  path.write_bytes(b"\nab\n")
  os.utime(path, ns=(1, 1))
  assert list(RowFile(path)) == [b"", b"ab"]
  assert len(builds) == 2


def test_damaged_index_is_built_again(
  path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  builds = count_builds(monkeypatch)
  path.write_bytes(b"a\nbb\nccc\n")
  RowFile(path)
  whole = index_of(path).read_bytes()
  damaged = [b"", whole[:40], whole[:-1], whole + b"\0"]
  for byte in range(0, len(whole), 7):
    flipped = bytearray(whole)
    flipped[byte] ^= 1
    damaged.append(bytes(flipped))
  for number, data in enumerate(damaged):
    index_of(path).write_bytes(data)
    assert list(RowFile(path)) == [b"a", b"bb", b"ccc"]
    assert len(builds) == number + 2
    assert index_of(path).read_bytes() == whole


def read_only(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes a folder read-only, for root as well."""
  make = row_index.atomically

  def atomically(place):
    if folder in place.parents:
      raise PermissionError(13, "Permission denied")
    return make(place)

  monkeypatch.setattr(row_index, "atomically", atomically)


def test_read_only_folder(
  path: pathlib.Path, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  builds = count_builds(monkeypatch)
  read_only(path.parent, monkeypatch)
  path.write_bytes(b"a\nb\n")
  for _ in range(2):
    assert list(RowFile(path)) == [b"a", b"b"]
  assert len(builds) == 1
  assert os.listdir(path.parent) == ["rows.tsv"]
  (name,) = os.listdir(cache)
  assert name.startswith("rows.tsv.")
  # A file of the same name elsewhere has an index of its own.
  other = path.parent / "more" / path.name
  other.parent.mkdir()
  other.write_bytes(b"c\n")
  assert list(RowFile(other)) == [b"c"]
  assert len(os.listdir(cache)) == 2


def test_no_place_for_the_index(
  path: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  caplog: pytest.LogCaptureFixture,
) -> None:
  read_only(tmp_path, monkeypatch)
  path.write_bytes(b"a\nb\n")
  with caplog.at_level(logging.WARNING, logger="absl"):
    assert list(RowFile(path)) == [b"a", b"b"]
  assert "set options.index_dir" in caplog.text
  with pytest.raises(
    UserError, match=r'index_dir ".*x" is not writable: Permission denied'
  ):
    RowFile(path, str(tmp_path / "x"))


def test_index_dir(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
  path.write_bytes(b"a\nb\n")
  assert list(RowFile(path, str(tmp_path / "own"))) == [b"a", b"b"]
  assert os.listdir(path.parent) == ["rows.tsv"]
  assert len(os.listdir(tmp_path / "own")) == 1


def test_large_index_is_mapped(
  path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(row_index, "_MAX_LOADED", 2)
  path.write_bytes(b"a\nbb\nccc\n")
  rows = RowFile(path)
  assert isinstance(rows._index.starts, np.memmap)
  assert list(pickle.loads(pickle.dumps(rows))) == [b"a", b"bb", b"ccc"]


def _digest(path: pathlib.Path) -> bytes:
  return opened.open_file(path).digest()


@pytest.mark.parametrize("replaced", [False, True])
def test_index_of_a_file_with_the_same_size_and_time(
  path: pathlib.Path, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
  builds = count_builds(monkeypatch)
  path.write_bytes(b"a\nbb\nccc\n")
  assert list(RowFile(path)) == [b"a", b"bb", b"ccc"]
  if replaced:
    new = path.with_name("new")
    new.write_bytes(b"aaa\nbb\nc\n")
    status = os.stat(path)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(new, path)
  else:
    rewrite(path, b"aaa\nbb\nc\n")
  assert list(RowFile(path)) == [b"aaa", b"bb", b"c"]
  assert len(builds) == 2
  # What changes nothing of the content costs no new index.
  copy = path.with_name("copy.tsv")
  shutil.copy2(path, copy)
  shutil.copy2(index_of(path), index_of(copy))
  path.chmod(0o600)
  assert list(RowFile(copy)) == list(RowFile(path))
  assert len(builds) == 2


def test_content_of_large_files(
  path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(content, "WHOLE_BYTES", 1000)
  monkeypatch.setattr(content, "SAMPLES", 5)
  monkeypatch.setattr(content, "SAMPLE_BYTES", 100)
  data = bytes(range(250)) * 20
  path.write_bytes(data)
  whole = _digest(path)
  seen = {0: True, 99: True, 100: False, 2450: True, 4899: False, 4999: True}
  for place, noticed in seen.items():
    changed = bytearray(data)
    changed[place] ^= 1
    path.write_bytes(changed)
    assert (_digest(path) != whole) == noticed, place
  # Inserted in a gap: what follows moves.
  path.write_bytes(data[:200] + b"x" + data[200:-1])
  assert _digest(path) != whole
  monkeypatch.undo()
  for place in range(0, 5000, 99):
    changed = bytearray(data)
    changed[place] ^= 1
    path.write_bytes(changed)
    assert _digest(path) != whole


def test_file_that_grows_meanwhile(
  path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path.write_bytes(b"a\nb\n")
  scan = row_index._scan

  def growing(*arguments):
    with open(path, "ab") as file:
      file.write(b"c\n")
    return scan(*arguments)

  monkeypatch.setattr(row_index, "_scan", growing)
  with pytest.raises(UserError, match="changed while its rows were counted"):
    RowFile(path)
  assert os.listdir(path.parent) == ["rows.tsv"]


def test_sparse_file_of_many_gigabytes(path: pathlib.Path) -> None:
  """Places past 2**32; what is not written takes no room on the disk."""
  size = 5 << 30
  index = index_of(path)
  with open(path, "wb") as file:
    file.write(b"first\n")
    file.seek(size - 7)
    file.write(b"\nsecond")
  # Finding the rows would read it all; this test writes the index itself.
  status = os.stat(path)
  starts = np.asarray([0, 6, size - 6, size + 1], "<i8").tobytes()
  header = row_index._Header(
    status.st_size,
    status.st_mtime_ns,
    rows=3,
    crlf=0,
    bom=0,
    no_newline=1,
    blank=0,
    crc=row_index._checksum(io.BytesIO(bytes(row_index._HEADER.size) + starts)),
    content=_digest(path),
  )
  index.write_bytes(header.pack() + starts)
  rows = RowFile(path)
  assert (rows[0], rows[2]) == (b"first", b"second")
  with pytest.raises(UserError, match=r"has 5,368,709,107 bytes, the limit"):
    rows[1]


def test_memory_does_not_depend_on_the_file(path: pathlib.Path) -> None:
  """Blocks are searched one at a time, in one buffer."""
  block = 1 << 16
  path.write_bytes(b"x" * (40 * block) + b"\n")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(opened, "BLOCK_BYTES", block)
    tracemalloc.start()
    try:
      index = row_index._scan(opened.open_file(path))
      assert sum(len(starts) for starts, *_ in index) == 1
      assert tracemalloc.get_traced_memory()[1] < 8 * block
    finally:
      tracemalloc.stop()


def _set_barrier(barrier: Any) -> None:
  global _barrier
  _barrier = barrier


def _read_in_process(path: pathlib.Path) -> tuple[int, list[bytes]]:
  _barrier.wait(60)
  return os.getpid(), list(RowFile(path))


def test_processes_build_at_once(path: pathlib.Path) -> None:
  lines = [b"row %d" % i for i in range(5000)]
  path.write_bytes(b"\n".join(lines))
  # This process has threads, so it must not fork; the socket of a fork server
  # would limit the length of TMPDIR.
  context = multiprocessing.get_context("spawn")
  barrier = context.Barrier(3)
  with context.Pool(3, _set_barrier, [barrier]) as pool:
    results = pool.map(_read_in_process, [path] * 3, chunksize=1)
  assert len({pid for pid, _ in results}) == 3
  assert all(rows == lines for _, rows in results)
  assert sorted(os.listdir(path.parent)) == ["rows.tsv", "rows.tsv.rows.idx"]
