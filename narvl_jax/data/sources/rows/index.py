"""The positions of the rows of a text file: found once, kept in an index.

The index of `FILE` is `FILE.rows.idx`, or a file in a cache folder if the
folder of `FILE` is read-only. That of a file in a store is in the cache folder,
with a copy beside the file for other machines. It is renamed into place, so
several processes may build it at once. An index that is damaged, or that was
made for another size, modification time or content (`content.py`), is built
again.

Layout, little-endian: a header (`_HEADER`), then rows + 1 int64 `starts`. Row i
is the bytes [starts[i], starts[i + 1] - 1) of the file, without its newline.
"""

import contextlib
import hashlib
import os
import pathlib
import struct
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from narvl_jax.data.sources.content import DIGEST_BYTES
from narvl_jax.data.sources.rows.opened import OpenedFile
from narvl_jax.errors import UserError
from narvl_jax.files import side_files
from narvl_jax.files.disk import atomically
from narvl_jax.files.schemes import StoreError
from narvl_jax.files.stores import cache_folder, is_remote, with_home
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import warn

SUFFIX = ".rows.idx"
_BOM = b"\xef\xbb\xbf"
_MAGIC = b"NARVLROW"
_VERSION = 2
# Magic, version, the fields of `_Header`, and a CRC-32 of all of these.
_FIELDS = struct.Struct(f"<8s9q{DIGEST_BYTES}s")
_HEADER = struct.Struct(f"{_FIELDS.format}I")
# An index of more starts is memory-mapped.
_MAX_LOADED = 1 << 22


class Index(NamedTuple):
  """Rows of a file.

  Attributes:
    starts: int64 [rows + 1].
  """

  starts: np.ndarray
  notes: tuple[str, ...]
  content: bytes


def open_index(
  file: OpenedFile, path: pathlib.Path, index_dir: str = ""
) -> Index:
  """Reads the index of an open file, or builds it.

  Args:
    index_dir: folder of the index; by default that of the file or, if it is
      not writable or in a store, `$XDG_CACHE_HOME/narvl_jax`.

  Raises:
    UserError: `index_dir` is not writable, or the file changed meanwhile.
    OSError: the file cannot be read.
  """
  places = _places(path, index_dir)
  for place in places:
    index = _load(place, file)
    if index is not None:
      return index
  shared = path.with_name(path.name + SUFFIX) if is_remote(path) else None
  if shared is not None:
    with contextlib.suppress(OSError):
      _fetch(shared, places[0])
      index = _load(places[0], file)
      if index is not None:
        return index
  for place in places:
    try:
      index = _build_at(place, file, path)
    except StoreError:
      raise
    except OSError as e:
      if index_dir:
        raise UserError(
          f'options.index_dir "{index_dir}" is not writable: {e.strerror}; name'
          " another folder"
        ) from e
      continue
    if shared is not None:
      # The bucket may be read-only.
      with contextlib.suppress(OSError):
        shared.write_bytes(place.read_bytes())
    return index
  warn(
    f'the index of the rows of "{path}" can be kept nowhere and is built in'
    " every process; set options.index_dir to a folder that is writable"
  )
  with tempfile.TemporaryFile() as out:
    return _read(out, _build(file, path, out))


def _fetch(shared: pathlib.Path, place: pathlib.Path) -> None:
  data = shared.read_bytes()
  place.parent.mkdir(parents=True, exist_ok=True)
  with atomically(place) as temporary:
    temporary.write_bytes(data)


def _places(path: pathlib.Path, index_dir: str) -> list[pathlib.Path]:
  absolute = path.absolute()
  # Distinguishes files of the same name in different folders.
  digest = hashlib.sha256(os.fsencode(str(absolute))).hexdigest()[:16]
  name = f"{path.name}.{digest}{SUFFIX}"
  if index_dir:
    if is_remote(index_dir):
      raise UserError(
        f'options.index_dir "{index_dir}" must be a folder of this machine'
      )
    return [with_home(index_dir) / name]
  cached = cache_folder() / name
  if is_remote(path):
    return [cached]
  return [absolute.with_name(absolute.name + SUFFIX), cached]


class _Header(NamedTuple):
  size: int  # Bytes of the file.
  mtime_ns: int
  rows: int
  crlf: int  # Rows that end with CRLF.
  bom: int  # 1 if there is a byte order mark.
  no_newline: int  # 1 if the last row has no newline.
  blank: int  # Empty rows at the end.
  crc: int  # CRC-32 of the starts.
  content: bytes = bytes(DIGEST_BYTES)

  def pack(self) -> bytes:
    head = _FIELDS.pack(_MAGIC, _VERSION, *self)
    return head + struct.pack("<I", zlib.crc32(head))

  def notes(self) -> tuple[str, ...]:
    notes = []
    if self.bom:
      notes.append("begins with a byte order mark")
    if 0 < self.crlf < self.rows + self.blank - self.no_newline:
      notes.append(f"{self.crlf} rows end with CRLF, the others with LF")
    if self.no_newline:
      notes.append("the last row has no newline: is the file complete?")
    if self.blank:
      notes.append(f"the last {self.blank} rows are empty and left out")
    return tuple(notes)


def _load(place: pathlib.Path, opened: OpenedFile) -> Index | None:
  """Returns the index at a place if it is intact and of this file."""
  if not place.is_file():  # Opening a pipe would block.
    return None
  try:
    with open(place, "rb") as file:
      head = file.read(_HEADER.size)
      if len(head) != _HEADER.size:
        return None
      magic, version, *fields, crc = _HEADER.unpack(head)
      header = _Header(*fields)
      if (magic, version) != (_MAGIC, _VERSION) or crc != zlib.crc32(head[:-4]):
        return None
      if header[:2] != opened.identity()[:2]:
        return None
      if header.content != opened.digest():
        return None
      return _read(file, header)
  except (OSError, ValueError):
    return None


def _read(file: IO[bytes], header: _Header) -> Index:
  """Reads the starts; raises `ValueError` if they are damaged."""
  count = header.rows + 1
  if os.fstat(file.fileno()).st_size != _HEADER.size + 8 * count:
    raise ValueError("wrong length")
  if _checksum(file) != header.crc:
    raise ValueError("wrong checksum")
  file.seek(_HEADER.size)
  if count <= _MAX_LOADED:
    starts = np.frombuffer(file.read(8 * count), "<i8")
  else:
    # The file is never written again.
    starts = np.memmap(file, "<i8", "r", _HEADER.size, (count,))
  return Index(starts, header.notes(), header.content)


def _checksum(file: IO[bytes]) -> int:
  file.seek(_HEADER.size)
  crc = 0
  while part := file.read(1 << 20):
    crc = zlib.crc32(part, crc)
  return crc


def _build_at(
  place: pathlib.Path, opened: OpenedFile, path: pathlib.Path
) -> Index:
  place.parent.mkdir(parents=True, exist_ok=True)
  side_files.make_way(place)
  with atomically(place) as temporary, open(temporary, "w+b") as file:
    header = _build(opened, path, file)
    # Others may share the folder.
    os.fchmod(file.fileno(), opened.mode() & 0o666 | 0o600)
    return _read(file, header)


def _build(opened: OpenedFile, path: pathlib.Path, out: IO[bytes]) -> _Header:
  """Writes header and starts with memory that does not grow with the file."""
  identity = opened.identity()
  size = identity[0]
  bom = opened.read(0, len(_BOM)) == _BOM
  out.seek(_HEADER.size)
  out.write(struct.pack("<q", len(_BOM) if bom else 0))
  crlf = newlines = 0
  text = f"finding the rows of {path.name}"
  with progress.doing(text, size, "bytes") as finding:
    for starts, returns, got in _scan(opened):
      out.write(starts.astype("<i8", copy=False).tobytes())
      newlines += len(starts)
      crlf += returns
      finding.advance(got)
  no_newline = size > 0 and opened.read(size - 1, 1) != b"\n"
  if no_newline:
    # Position of the row after a newline that is missing.
    out.write(struct.pack("<q", size + 1))
  rows = newlines + no_newline
  out.flush()
  kept = _without_blank(opened, out.fileno(), rows)
  out.truncate(_HEADER.size + 8 * (kept + 1))
  content = opened.digest()
  if opened.identity() != identity:
    raise UserError(
      f'"{path}" changed while its rows were counted; wait until it is written'
    )
  header = _Header(
    size=size,
    mtime_ns=identity[1],
    rows=kept,
    crlf=crlf,
    bom=bom,
    no_newline=no_newline,
    blank=rows - kept,
    crc=_checksum(out),
    content=content,
  )
  out.seek(0)
  out.write(header.pack())
  out.flush()
  return header


def _without_blank(opened: OpenedFile, starts_fd: int, rows: int) -> int:
  """Returns the number of rows without the empty ones at the end."""
  while rows:
    pair = os.pread(starts_fd, 16, _HEADER.size + 8 * (rows - 1))
    start, end = struct.unpack("<2q", pair)
    length = end - 1 - start
    if length > 1 or (length == 1 and opened.read(start, 1) != b"\r"):
      break
    rows -= 1
  return rows


def _scan(opened: OpenedFile) -> Iterator[tuple[np.ndarray, int, int]]:
  """Yields (int64 starts after newlines, number of CRLFs, bytes) of blocks."""
  first = last = 0
  for block in opened.blocks():
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    # CR and LF may lie in different blocks.
    before = np.where(ends > 0, data[ends - 1], last)
    yield ends + (first + 1), int((before == ord("\r")).sum()), len(block)
    first, last = first + len(block), data[-1]
