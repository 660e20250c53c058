"""Rows of files: any contents, one index, flat memory, changed files."""

import io
import logging
import multiprocessing
import os
import pathlib
import pickle
import shutil
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narvl_jax.data.sources import content
from narvl_jax.data.sources.rows import index as row_index
from narvl_jax.data.sources.rows.files import RowFile, RowFiles, text
from narvl_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  """A cache folder of the test's own."""
  folder = tmp_path / "cache"
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  return folder / "narvl_jax"


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
  (tmp_path / "data").mkdir()
  return tmp_path / "data" / "rows.tsv"


def index_of(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(path.name + row_index.SUFFIX)


def expected(data: bytes) -> list[bytes]:
  rows = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
  rows = [r[:-1] if r.endswith(b"\r") else r for r in rows]
  while rows and not rows[-1]:
    rows.pop()
  return rows


contents = st.lists(
  st.sampled_from(
    [b"\n", b"\r\n", b"\r", b"a", b"\t", b"\xef\xbb\xbf", b"bcdefghij" * 9]
  ),
  max_size=40,
).map(b"".join)


@settings(
  max_examples=300,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=contents, block_bytes=st.integers(1, 64), short=st.booleans())
def test_rows_are_those_of_split(
  path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  data: bytes,
  block_bytes: int,
  short: bool,
) -> None:
  path.write_bytes(data)
  index_of(path).unlink(missing_ok=True)
  monkeypatch.setattr(row_index, "BLOCK_BYTES", block_bytes)
  # Both ways of searching a block.
  monkeypatch.setattr(row_index, "_SHORT_ROW", 2048 if short else 1)
  if not expected(data):
    with pytest.raises(UserError, match="has no rows"):
      RowFile(path)
    return
  rows = RowFile(path)
  assert list(rows) == expected(data)
  # From the index that was kept, too.
  assert list(RowFile(path)) == expected(data)
  body = data.removeprefix(b"\xef\xbb\xbf")
  assert any("byte order" in note for note in rows.notes) == (body != data)
  assert any("no newline" in n for n in rows.notes) == (data[-1:] != b"\n")
  crlf, all_ends = data.count(b"\r\n"), data.count(b"\n")
  assert any("CRLF" in n for n in rows.notes) == (0 < crlf < all_ends)


def test_access(path: pathlib.Path) -> None:
  path.write_bytes(b"zero\none\ntwo\n")
  rows = RowFile(path)
  assert len(rows) == 3
  assert rows[-1] == rows[np.int64(2)] == b"two"
  assert rows[:2] == [b"zero", b"one"]
  for index in (3, -4):
    with pytest.raises(IndexError, match=f"no row {index} of 3"):
      rows[index]


def test_oddities_are_told_once(
  path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  path.write_bytes(b"\xef\xbb\xbfa\r\nb\nc\n\n\r\nd\n\n\n")
  with caplog.at_level(logging.WARNING, logger="absl"):
    first, again = RowFile(path), RowFile(path)
  assert first.notes == again.notes
  assert first.notes == (
    "begins with a byte order mark",
    "2 rows end with CRLF, the others with LF",
    "the last 2 rows are empty and left out",
  )
  (message,) = [record.getMessage() for record in caplog.records]
  assert message == f'"{path}": ' + "; ".join(first.notes)
  path.write_bytes(b"a\r\nb\r\n")
  assert RowFile(path).notes == ()


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
  # Only the time of change tells these apart.
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


def test_changed_file(path: pathlib.Path) -> None:
  path.write_bytes(b"a\nb\n")
  rows, state = RowFile(path), pickle.dumps(RowFile(path))
  with open(path, "ab") as file:
    file.write(b"c\n")
  message = r"rows.tsv\" changed while it is in use \(4 bytes .*, now 6\)"
  with pytest.raises(UserError, match=message):
    rows[0]
  with pytest.raises(UserError, match=message):
    # Its rows are not even counted.
    len(pickle.loads(state))
  # Written anew with the same size: the time tells.
  path.write_bytes(b"a\nb\n")
  rows = RowFile(path)
  path.write_bytes(b"aab\n")
  os.utime(path, ns=(5, 5))
  with pytest.raises(UserError, match="changed while it is in use"):
    rows[0]


def _digest(path: pathlib.Path) -> bytes:
  with open(path, "rb") as file:
    return content.content_digest(file.fileno(), path.stat().st_size)


def _rewrite(path: pathlib.Path, data: bytes) -> None:
  """Changes the content and keeps the times, as `cp -p` over a file does."""
  status = os.stat(path)
  path.write_bytes(data)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


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
    _rewrite(path, b"aaa\nbb\nc\n")
  assert list(RowFile(path)) == [b"aaa", b"bb", b"c"]
  assert len(builds) == 2
  # What changes nothing of the content costs no new index.
  copy = path.with_name("copy.tsv")
  shutil.copy2(path, copy)
  shutil.copy2(index_of(path), index_of(copy))
  path.chmod(0o600)
  assert list(RowFile(copy)) == list(RowFile(path))
  assert len(builds) == 2


def test_file_in_use_that_keeps_its_size_and_time(path: pathlib.Path) -> None:
  path.write_bytes(b"a\nbb\n")
  rows, state = RowFile(path), pickle.dumps(RowFile(path))
  path.chmod(0o600)
  assert rows[0] == b"a"
  _rewrite(path, b"aa\nb\n")
  with pytest.raises(UserError, match="changed while it is in use"):
    rows[0]
  with pytest.raises(UserError, match="changed while it is in use"):
    len(pickle.loads(state))


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


def test_replaced_file_is_read_to_its_end(path: pathlib.Path) -> None:
  path.write_bytes(b"a\nb\n")
  rows, state = RowFile(path), pickle.dumps(RowFile(path))
  new = path.with_name("new")
  new.write_bytes(b"c\nd\n")
  os.replace(new, path)
  # The open file is still the old one; another process would get the new one.
  assert list(rows) == [b"a", b"b"]
  with pytest.raises(UserError, match="changed while it is in use"):
    pickle.loads(state)[0]


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


@given(
  data=st.text("abc\n", min_size=1, max_size=30).map(str.encode),
  word=st.text("abc", min_size=1, max_size=4).map(str.encode),
  block_bytes=st.integers(1, 9),
)
@settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_contains(
  path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  data: bytes,
  word: bytes,
  block_bytes: int,
) -> None:
  monkeypatch.setattr(
    "narvl_jax.data.sources.rows.files._SEARCH_BYTES", block_bytes
  )
  path.write_bytes(b"x" + data)
  index_of(path).unlink(missing_ok=True)
  assert RowFile(path).contains(word) == (word in data)


def test_bad_rows(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path.write_bytes(b"a\nb\0c\0\n" + b"d" * 50 + b"\n")
  rows = RowFile(path)
  assert rows[0] == b"a"
  with pytest.raises(UserError, match="2 NUL bytes, the first at byte 2"):
    rows[1]
  monkeypatch.setattr("narvl_jax.data.sources.rows.files.MAX_ROW_BYTES", 49)
  with pytest.raises(UserError, match="row has 50 bytes, the limit is 49"):
    rows[2]


def test_no_text_file(path: pathlib.Path) -> None:
  with pytest.raises(UserError, match=r"cannot read .*No such file"):
    RowFile(path)
  with pytest.raises(UserError, match=r"is no file; check options.path"):
    RowFile(path.parent)
  os.mkfifo(path)
  with pytest.raises(UserError, match="is no file"):
    RowFile(path)
  path.unlink()
  path.write_bytes(b"\x1f\x8b\x08\0\0")
  with pytest.raises(UserError, match="is compressed; unpack it"):
    RowFile(path)
  path.write_bytes(b"")
  with pytest.raises(UserError, match=r'rows.tsv" has no rows'):
    RowFile(path)


def test_too_many_open_files(
  path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path.write_bytes(b"a\n")

  def no_more(*_):
    raise OSError(24, "Too many open files")

  monkeypatch.setattr(os, "open", no_more)
  with pytest.raises(UserError, match=r"Too many open files; .*ulimit -n"):
    RowFile(path)


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
  """Blocks are searched in place: no more than one a thread is held."""
  block = 1 << 16
  path.write_bytes(b"x" * (40 * block) + b"\n")
  sizes = []
  find = row_index._newlines

  def spy(data, begin, end):
    sizes.append((id(data), len(data)))
    return find(data, begin, end)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(row_index, "_newlines", spy)
    patch.setattr(row_index, "BLOCK_BYTES", block)
    assert len(RowFile(path)) == 1
  assert len(sizes) == 41
  assert len({buffer for buffer, _ in sizes}) <= 8
  assert {size for _, size in sizes} == {block + 1}


def _read_in_process(arguments) -> tuple[int, list[bytes]]:
  path, barrier = arguments
  if barrier is not None:
    barrier.wait(60)
  rows = RowFile(path)
  return os.getpid(), list(rows)


def _rows_of(rows: RowFiles) -> tuple[int, list[bytes]]:
  return os.getpid(), list(rows)


def test_processes_build_at_once(path: pathlib.Path) -> None:
  lines = [b"row %d" % i for i in range(5000)]
  path.write_bytes(b"\n".join(lines))
  # Not of this process, which has threads.
  context = multiprocessing.get_context("forkserver")
  with context.Manager() as manager, context.Pool(3) as pool:
    barrier = manager.Barrier(3)
    results = pool.map(_read_in_process, [(path, barrier)] * 3, chunksize=1)
  assert len({pid for pid, _ in results}) == 3
  assert all(rows == lines for _, rows in results)
  assert sorted(os.listdir(path.parent)) == ["rows.tsv", "rows.tsv.rows.idx"]


def test_spawned_process(path: pathlib.Path) -> None:
  path.write_bytes(b"a\nb\n")
  other = path.with_name("other.tsv")
  other.write_bytes(b"c\n")
  rows = RowFiles([path, other])
  assert len(pickle.dumps(rows)) < 2000
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    pid, found = pool.apply(_rows_of, (rows,))
  assert pid != os.getpid()
  assert found == list(rows) == [b"a", b"b", b"c"]


def test_threads(path: pathlib.Path) -> None:
  lines = [b"row %d" % i for i in range(200)]
  path.write_bytes(b"\n".join(lines))
  rows = pickle.loads(pickle.dumps(RowFile(path)))
  found: list[list[bytes]] = []
  threads = [
    threading.Thread(target=lambda: found.append(list(rows))) for _ in range(6)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == [lines] * 6


def test_files_are_closed(path: pathlib.Path) -> None:
  path.write_bytes(b"a\n")
  rows = RowFile(path)
  fd = rows._fd
  del rows
  with pytest.raises(OSError, match="Bad file descriptor"):
    os.fstat(fd)


def test_several_files(path: pathlib.Path) -> None:
  path.write_bytes(b"a\nb\n")
  other = path.with_name("other.tsv")
  other.write_bytes(b"c")
  rows = RowFiles([path, other, path])
  assert list(rows) == [b"a", b"b", b"c", b"a", b"b"]
  assert rows[-3] == b"c"
  assert rows[1:3] == [b"b", b"c"]
  assert [rows.locate(i) for i in (0, 2, -1)] == [
    f"{path} row 1",
    f"{other} row 1",
    f"{path} row 2",
  ]
  assert list(rows.notes()) == [
    f"{other}: the last row has no newline: is the file complete?"
  ]
  with pytest.raises(IndexError, match="no row 5 of 5"):
    rows[5]


def test_text() -> None:
  assert text("ä".encode(), "question") == "ä"
  with pytest.raises(UserError, match=r"the question is not UTF-8 at byte 3"):
    text(b"ab\xff", "question")
