"""Random access to the rows of text files; memory does not grow with them.

Only the positions of the rows are kept (`index.py`). A pickled object opens its
files again in the other process.
"""

import itertools
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from narvl_jax.data.sources.base import checked_index, find_part
from narvl_jax.data.sources.files import START_BYTES, check_start
from narvl_jax.data.sources.rows import index as row_index
from narvl_jax.data.sources.rows.opened import (
  Identity,
  OpenedFile,
  open_file,
)
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.text import warn

# No text file has longer rows.
MAX_ROW_BYTES = 1 << 28
# Files whose oddities this process has reported.
_reported: set[tuple[str, Identity]] = set()


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
    self.path = as_path(path)
    self._index_dir = index_dir
    self._lock = threading.Lock()
    self._file: OpenedFile | None = None
    self._identity: Identity | None = None
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
    return len(self._opened().starts) - 1

  def __getitem__(self, index: Any) -> Any:
    """Returns a row.

    Raises:
      IndexError: there is no such row.
      UserError: the file changed since it was opened, or the row is too long
        or contains NUL bytes.
    """
    starts = self._opened().starts
    number = checked_index(index, len(starts) - 1, "row")
    start = int(starts[number])
    length = int(starts[number + 1]) - 1 - start
    if length > MAX_ROW_BYTES:
      raise UserError(
        f"the row has {length:,} bytes, the limit is {MAX_ROW_BYTES:,}; is this"
        " a text file with newlines?"
      )
    row = self._read(start, length)
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
    self._opened()
    assert self._file is not None
    kept = b""
    for block in self._file.blocks():
      if word in kept + block:
        return True
      # The word may span two blocks.
      kept = (kept + block)[-(len(word) - 1) :] if len(word) > 1 else b""
    return False

  def __getstate__(self) -> dict[str, Any]:
    state = dict(self.__dict__)
    for name in ("_lock", "_index"):
      state.pop(name, None)
    return {**state, "_file": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def _opened(self) -> row_index.Index:
    if self._file is None:
      with self._lock:
        if self._file is None:
          self._open()
    return self._index

  def _open(self) -> None:
    file = open_file(self.path)
    try:
      check_start(self.path, file.read(0, START_BYTES))
      if self._identity is None:
        self._identity = file.identity()
      # Hosts may see different values of it.
      self._changed_ns = file.changed_ns()
      self._check(file)
      self._index = row_index.open_index(file, self.path, self._index_dir)
      if self._content is None:
        self._content = self._index.content
      if self._content != self._index.content:
        raise self._changed(file.identity())
    except BaseException:
      file.close()
      raise
    # Last, because other threads test it.
    self._file = file

  def _read(self, start: int, length: int) -> bytes:
    file = self._file
    assert file is not None
    try:
      row = file.read(start, length)
    except FileNotFoundError as e:
      raise self._changed(None) from e
    # After reading, so that every earlier change is noticed.
    self._check(file)
    return row

  def _check(self, file: OpenedFile) -> None:
    identity = file.identity()
    if identity != self._identity:
      raise self._changed(identity)
    changed = file.changed_ns()
    if changed != self._changed_ns:
      # Name or permissions changed, or `cp -p` overwrote the file.
      if file.digest() != self._content:
        raise self._changed(identity)
      self._changed_ns = changed

  def _changed(self, now: Identity | None) -> UserError:
    assert self._identity is not None
    size = "replaced" if now is None else f"{now[0]:,}"
    return UserError(
      f'"{self.path}" changed while it is in use ({self._identity[0]:,} bytes'
      f" when opened, now {size}); restart, and leave the file alone"
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


def _cannot_read(path: pathlib.Path, error: OSError) -> str:
  hint = "check options.path"
  if error.errno in (23, 24):  # ENFILE, EMFILE
    hint = "raise the limit of open files (ulimit -n) or join the files"
  return f'cannot read "{path}": {error.strerror or error}; {hint}'
