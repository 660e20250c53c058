"""Random access to the rows of text files; memory does not grow with them.

Only the positions of the rows are kept (`index.py`). A pickled object opens its
files again in the other process.
"""

import itertools
import os
import pathlib
import stat
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from narvl_jax.data.sources.base import checked_index, find_part
from narvl_jax.data.sources.content import content_digest
from narvl_jax.data.sources.files import START_BYTES, check_start
from narvl_jax.data.sources.rows import index as row_index
from narvl_jax.errors import UserError
from narvl_jax.terminal.text import warn

# No text file has longer rows.
MAX_ROW_BYTES = 1 << 28
_SEARCH_BYTES = 1 << 22
# Files whose oddities this process has reported.
_reported: set[tuple[str, tuple[int, int, int]]] = set()


class RowFile(Sequence[bytes]):
  """Rows of one file, without LF or CRLF; may be read by several threads.

  A byte order mark and empty last rows are left out.

  Attributes:
    notes: oddities: byte order mark, mixed ends of rows, no newline at the
      end, empty last rows. They are also logged once as a warning.
  """

  def __init__(self, path: str | os.PathLike[str], index_dir: str = "") -> None:
    """Opens a file and its index, which is built if there is none.

    Raises:
      UserError: the file cannot be read, is not a plain text file or is empty.
    """
    self.path = pathlib.Path(path)
    self._index_dir = index_dir
    self._lock = threading.Lock()
    self._fd = -1
    self._identity: tuple[int, int, int] | None = None
    self._content: bytes | None = None
    try:
      self._open()
    except OSError as e:
      raise UserError(_cannot_read(self.path, e)) from e
    if not len(self):
      raise UserError(f'"{self.path}" has no rows; check options.path')
    self.notes = self._index.notes
    assert self._identity is not None
    key = (str(self.path.absolute()), self._identity)
    if self.notes and key not in _reported:
      _reported.add(key)
      warn(f'"{self.path}": {"; ".join(self.notes)}')

  def __len__(self) -> int:
    return len(self._starts()) - 1

  def __getitem__(self, index: Any) -> Any:
    """Returns a row.

    Raises:
      IndexError: there is no such row.
      UserError: the file changed since it was opened, or the row is too long
        or contains NUL bytes.
    """
    starts = self._starts()
    number = checked_index(index, len(starts) - 1, "row")
    start = int(starts[number])
    length = int(starts[number + 1]) - 1 - start
    if length > MAX_ROW_BYTES:
      raise UserError(
        f"the row has {length:,} bytes, the limit is {MAX_ROW_BYTES:,}; is this"
        " a text file with newlines?"
      )
    row = _read_at(self._fd, start, length)
    # After reading, so that every earlier change is noticed.
    self._check(self._fd)
    if len(row) < length:
      raise UserError(f'"{self.path}" is cut off within this row')
    if b"\0" in row:
      raise UserError(
        f"the row contains {row.count(0)} NUL bytes, the first at byte"
        f" {row.index(0) + 1}; the file is damaged or not UTF-8 text"
      )
    return row[:-1] if row.endswith(b"\r") else row

  def identify(self) -> tuple[tuple[str, int, int], bytes]:
    """Returns (name, size, mtime in ns), and the digest of the content."""
    assert self._identity is not None
    assert self._content is not None
    return (self.path.name, *self._identity[:2]), self._content

  def contains(self, word: bytes) -> bool:
    """Returns whether a word occurs in the file, without splitting rows."""
    self._starts()
    start, kept = 0, b""
    while block := os.pread(self._fd, _SEARCH_BYTES, start):
      if word in kept + block:
        return True
      start += len(block)
      # The word may span two blocks.
      kept = (kept + block)[-(len(word) - 1) :] if len(word) > 1 else b""
    return False

  def __getstate__(self) -> dict[str, Any]:
    state = dict(self.__dict__)
    for name in ("_lock", "_fd", "_index", "_close"):
      state.pop(name, None)
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock(), _fd=-1)

  def _starts(self) -> np.ndarray:
    if self._fd < 0:
      with self._lock:
        if self._fd < 0:
          self._open()
    return self._index.starts

  def _open(self) -> None:
    # Opening a pipe waits for a writer.
    if not stat.S_ISREG(os.stat(self.path).st_mode):
      raise UserError(f'"{self.path}" is not a file; check options.path')
    fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
      check_start(self.path, os.pread(fd, START_BYTES, 0))
      status = os.fstat(fd)
      if self._identity is None:
        self._identity = row_index.identity(status)
      # Changes with every write, even if mtime is set back. Hosts may see
      # different values of it.
      self._ctime_ns = status.st_ctime_ns
      self._check(fd)
      self._index = row_index.open_index(fd, self.path, self._index_dir)
      if self._content is None:
        self._content = self._index.content
      if self._content != self._index.content:
        raise self._changed(status)
    except BaseException:
      os.close(fd)
      raise
    self._close = weakref.finalize(self, os.close, fd)
    # Last, because other threads test it.
    self._fd = fd

  def _check(self, fd: int) -> None:
    status = os.fstat(fd)
    if row_index.identity(status) != self._identity:
      raise self._changed(status)
    if status.st_ctime_ns != self._ctime_ns:
      # Name or permissions changed, or `cp -p` overwrote the file.
      if content_digest(fd, status.st_size) != self._content:
        raise self._changed(status)
      self._ctime_ns = status.st_ctime_ns

  def _changed(self, status: os.stat_result) -> UserError:
    assert self._identity is not None
    return UserError(
      f'"{self.path}" changed while it is in use ({self._identity[0]:,} bytes'
      f" when opened, now {status.st_size:,}); restart, and leave the file"
      " alone"
    )


class RowFiles(Sequence[bytes]):
  """The rows of several files, one file after another; see `RowFile`."""

  def __init__(
    self, paths: Sequence[str | os.PathLike[str]], index_dir: str = ""
  ) -> None:
    self.files = [RowFile(path, index_dir) for path in paths]
    self._ends = list(itertools.accumulate(len(file) for file in self.files))

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: Any) -> Any:
    file, row = self.find(index)
    return file[row]

  def find(self, index: int) -> tuple[RowFile, int]:
    """Returns the file of a row and the row's index in it."""
    file, row = find_part(self._ends, checked_index(index, len(self), "row"))
    return self.files[file], row

  def locate(self, index: int) -> str:
    """Returns a row's place, such as "vqa.tsv row 17", counted from 1."""
    file, row = self.find(index)
    return f"{file.path} row {row + 1}"

  def notes(self) -> Iterator[str]:
    """Yields the notes of all files with their names."""
    for file in self.files:
      for note in file.notes:
        yield f"{file.path}: {note}"


def text(field: bytes, name: str) -> str:
  """Decodes a field; raises `UserError` if it is not UTF-8."""
  try:
    return field.decode()
  except UnicodeDecodeError as e:
    raise UserError(
      f"the {name} is not UTF-8 at byte {e.start + 1}:"
      f" {field[e.start : e.start + 4]!r}; save the file as UTF-8"
    ) from e


def _read_at(fd: int, start: int, length: int) -> bytes:
  row = os.pread(fd, length, start)
  # A signal or a network drive may return less at a time.
  while len(row) < length and (
    more := os.pread(fd, length - len(row), start + len(row))
  ):
    row += more
  return row


def _cannot_read(path: pathlib.Path, error: OSError) -> str:
  hint = "check options.path"
  if error.errno in (23, 24):  # ENFILE, EMFILE
    hint = "raise the limit of open files (ulimit -n) or join the files"
  return f'cannot read "{path}": {error.strerror or error}; {hint}'
