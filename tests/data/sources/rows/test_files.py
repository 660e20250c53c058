"""Rows of files: any contents, changed files, processes and threads."""

import bz2
import gzip
import io
import logging
import lzma
import multiprocessing
import os
import pathlib
import pickle
import threading
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narvl_jax.data.sources.rows import opened
from narvl_jax.data.sources.rows.files import RowFile, RowFiles, text
from narvl_jax.errors import UserError
from tests.data.sources.rows.row_files import index_of, rewrite


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
@given(data=contents, block_bytes=st.integers(1, 64))
def test_rows_are_those_of_split(
  path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  data: bytes,
  block_bytes: int,
) -> None:
  path.write_bytes(data)
  index_of(path).unlink(missing_ok=True)
  monkeypatch.setattr(opened, "BLOCK_BYTES", block_bytes)
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
  for index in (3, -4):
    with pytest.raises(IndexError, match=f"no row {index} of 3"):
      rows[index]


def test_oddities_are_reported_once(
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
  # Written again with the same size: the time differs.
  path.write_bytes(b"a\nb\n")
  rows = RowFile(path)
  path.write_bytes(b"aab\n")
  os.utime(path, ns=(5, 5))
  with pytest.raises(UserError, match="changed while it is in use"):
    rows[0]


def test_file_in_use_that_keeps_its_size_and_time(path: pathlib.Path) -> None:
  path.write_bytes(b"a\nbb\n")
  rows, state = RowFile(path), pickle.dumps(RowFile(path))
  path.chmod(0o600)
  assert rows[0] == b"a"
  rewrite(path, b"aa\nb\n")
  with pytest.raises(UserError, match="changed while it is in use"):
    rows[0]
  with pytest.raises(UserError, match="changed while it is in use"):
    len(pickle.loads(state))


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
  monkeypatch.setattr(opened, "BLOCK_BYTES", block_bytes)
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
  with pytest.raises(UserError, match=r"is not a file; check options.path"):
    RowFile(path.parent)
  os.mkfifo(path)
  with pytest.raises(UserError, match="is not a file"):
    RowFile(path)
  path.unlink()
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, "w") as archive:
    archive.writestr("a", "b")
  for content, suffix, command in (
    (gzip.compress(b"a"), ".gz", "gunzip -k"),
    (bz2.compress(b"a"), ".bz2", "bunzip2 -k"),
    (lzma.compress(b"a"), ".xz", "unxz -k"),
    (b"\x28\xb5\x2f\xfd\0\0", ".zst", "unzstd"),
    (packed.getvalue(), ".zip", "unzip"),
  ):
    path.write_bytes(content)
    with pytest.raises(
      UserError,
      match=rf"is compressed \({suffix}\); rename it to .*{suffix} and unpack"
      rf" it first: {command} .*rows.tsv{suffix}$",
    ):
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


def _rows_of(rows: RowFiles) -> tuple[int, list[bytes]]:
  return os.getpid(), list(rows)


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
  assert isinstance(rows._file, opened._LocalFile)
  fd = rows._file._fd
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
