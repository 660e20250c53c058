"""Where the rows of a text file begin: found once, then kept in a file.

The index of `FILE` is `FILE.rows.idx`, or lies in a cache folder if that of
the file is read-only. It is written under another name and then renamed, so
that any number of processes may build it at once. One that is damaged or does
not fit the file's size, modification time and content (`content.py`) is built
again.

Layout, little-endian: a header (`_HEADER`), then count + 1 int64: row i is
the bytes [start[i], start[i + 1] - 1) of the file, a newline follows it.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from narvl_jax.data.sources.content import DIGEST_BYTES, content_digest
from narvl_jax.data.sources.files import with_home
from narvl_jax.errors import UserError
from narvl_jax.files import side_files
from narvl_jax.files.disk import atomically
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import warn

SUFFIX = ".rows.idx"
BLOCK_BYTES = 1 << 24
_BOM = b"\xef\xbb\xbf"
_MAGIC = b"NARVLROW"
_VERSION = 2
# Magic, version, bytes and mtime_ns of the file, rows, rows that end with
# CRLF, 1 if there is a BOM, 1 if the last row has no newline, empty last rows,
# CRC-32 of the starts, digest of the content, CRC-32 of all before.
_FIELDS = struct.Struct(f"<8s9q{DIGEST_BYTES}s")
_HEADER = struct.Struct(f"{_FIELDS.format}I")
# Starts that are read into memory; more of them are mapped.
_MAX_LOADED = 1 << 22
# Blocks with more rows than one in so many bytes are searched by NumPy.
_SHORT_ROW = 2048


class Index(NamedTuple):
  """Rows of a file.

  Attributes:
    starts: int64 [rows + 1]; row i is [starts[i], starts[i + 1] - 1).
    notes: what is odd about the file, if anything.
    content: digest of the file.
  """

  starts: np.ndarray
  notes: tuple[str, ...]
  content: bytes


def identity(status: os.stat_result) -> tuple[int, int, int]:
  """Returns what changes when a file does: size, mtime in ns, inode."""
  return status.st_size, status.st_mtime_ns, status.st_ino


def open_index(fd: int, path: pathlib.Path, index_dir: str = "") -> Index:
  """Reads the index of a file, after building it if need be.

  Args:
    fd: the file, open for reading.
    path: its name.
    index_dir: folder of the index; by default that of the file or, if one
      cannot write there, `$XDG_CACHE_HOME/narvl_jax`.

  Raises:
    UserError: `index_dir` is not writable, or the file changed meanwhile.
  """
  status = os.fstat(fd)
  places = _places(path, index_dir)
  for place in places:
    index = _load(place, fd, status)
    if index is not None:
      return index
  for place in places:
    try:
      return _build_at(place, fd, path)
    except OSError as e:
      if index_dir:
        raise UserError(
          f'options.index_dir "{index_dir}" is not writable: {e.strerror}; name'
          " another folder"
        ) from e
  warn(
    f'the index of the rows of "{path}" can be kept nowhere and is built in'
    " every process; set options.index_dir to a folder that is writable"
  )
  with tempfile.TemporaryFile() as file:
    header = _build(fd, path, file, BLOCK_BYTES)
    return _read(file, header)


def _places(path: pathlib.Path, index_dir: str) -> list[pathlib.Path]:
  absolute = path.absolute()
  # Files of one name in different folders.
  digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
  name = f"{path.name}.{digest}{SUFFIX}"
  if index_dir:
    return [with_home(index_dir) / name]
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  folder = with_home(cache) / "narvl_jax"
  return [absolute.with_name(absolute.name + SUFFIX), folder / name]


class _Header(NamedTuple):
  size: int
  mtime_ns: int
  rows: int
  crlf: int
  bom: int
  no_newline: int
  blank: int
  crc: int
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


def _load(place: pathlib.Path, fd: int, status: os.stat_result) -> Index | None:
  """Returns an index if it is there, whole, and that of this very file."""
  if not place.is_file():
    # A pipe would never be opened.
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
      if header[:2] != (status.st_size, status.st_mtime_ns):
        return None
      if header.content != content_digest(fd, header.size):
        return None
      return _read(file, header)
  except (OSError, ValueError):
    return None


def _read(file: IO[bytes], header: _Header) -> Index:
  """Reads the starts; `ValueError` if they are damaged."""
  count = header.rows + 1
  if os.fstat(file.fileno()).st_size != _HEADER.size + 8 * count:
    raise ValueError("wrong length")
  if _checksum(file) != header.crc:
    raise ValueError("wrong checksum")
  file.seek(_HEADER.size)
  if count <= _MAX_LOADED:
    starts = np.frombuffer(file.read(8 * count), "<i8")
  else:
    # The file is renamed into place and never written again.
    starts = np.memmap(file, "<i8", "r", _HEADER.size, (count,))
  return Index(starts, header.notes(), header.content)


def _checksum(file: IO[bytes]) -> int:
  file.seek(_HEADER.size)
  crc = 0
  while part := file.read(1 << 20):
    crc = zlib.crc32(part, crc)
  return crc


def _build_at(place: pathlib.Path, fd: int, path: pathlib.Path) -> Index:
  place.parent.mkdir(parents=True, exist_ok=True)
  side_files.make_way(place)
  with atomically(place) as temporary, open(temporary, "w+b") as file:
    header = _build(fd, path, file, BLOCK_BYTES)
    # As readable as any other file: others may share the folder.
    os.fchmod(file.fileno(), os.fstat(fd).st_mode & 0o666 | 0o600)
    return _read(file, header)


def _build(
  fd: int, path: pathlib.Path, out: IO[bytes], block_bytes: int
) -> _Header:
  """Writes header and starts; memory does not depend on the file's size."""
  status = os.fstat(fd)
  size = status.st_size
  bom = os.pread(fd, len(_BOM), 0) == _BOM
  out.seek(_HEADER.size)
  out.write(struct.pack("<q", len(_BOM) if bom else 0))
  crlf = newlines = 0
  text = f"finding the rows of {path.name}"
  with progress.doing(text, size, "bytes") as finding:
    for starts, returns in _scan(fd, size, block_bytes):
      out.write(starts.astype("<i8", copy=False).tobytes())
      newlines += len(starts)
      crlf += returns
      finding.done = min(finding.done + block_bytes, size)
  no_newline = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
  if no_newline:
    # As if a newline followed.
    out.write(struct.pack("<q", size + 1))
  rows = newlines + no_newline
  out.flush()
  kept = _without_blank(fd, out.fileno(), rows)
  out.truncate(_HEADER.size + 8 * (kept + 1))
  content = content_digest(fd, size)
  if identity(os.fstat(fd)) != identity(status):
    raise UserError(
      f'"{path}" changed while its rows were counted; wait until it is written'
    )
  header = _Header(
    size=size,
    mtime_ns=status.st_mtime_ns,
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


def _without_blank(fd: int, starts_fd: int, rows: int) -> int:
  """Returns how many rows there are before the empty ones at the end."""
  while rows:
    pair = os.pread(starts_fd, 16, _HEADER.size + 8 * (rows - 1))
    start, end = struct.unpack("<2q", pair)
    length = end - 1 - start
    if length > 1 or (length == 1 and os.pread(fd, 1, start) != b"\r"):
      break
    rows -= 1
  return rows


def _scan(
  fd: int, size: int, block_bytes: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields for each block, in order: starts after newlines, CRLFs among them.

  Starts are int64.
  """
  local = threading.local()

  def scan(first: int) -> tuple[np.ndarray, int]:
    # One byte more in front: CR and LF may lie in different blocks.
    begin = max(first - 1, 0)
    wanted = min(block_bytes, size - first) + first - begin
    if not hasattr(local, "block"):
      # Memory that is used again costs no page faults.
      local.block = bytearray(block_bytes + 1)
    block = local.block
    with memoryview(block) as view:
      got = 0
      while got < wanted:
        more = os.preadv(fd, [view[got:wanted]], begin + got)
        if not more:
          break  # Cut meanwhile; the caller sees that.
        got += more
    ends = _newlines(block, first - begin, got)
    data = np.frombuffer(block, np.uint8, got)
    before = data[ends[ends > 0] - 1]
    return ends + (begin + 1), int(np.count_nonzero(before == ord("\r")))

  workers = min(8, 2 * len(os.sched_getaffinity(0)))
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    yield from pool.map(scan, range(0, size, block_bytes))


def _newlines(block: Any, begin: int, end: int) -> np.ndarray:
  """Returns the positions of newlines in `block[begin:end]`, int64."""
  found = []
  position = block.find(b"\n", begin, end)
  while position >= 0:
    found.append(position)
    if len(found) > end // _SHORT_ROW:
      data = np.frombuffer(block, np.uint8, end)
      return begin + np.flatnonzero(data[begin:] == ord("\n"))
    position = block.find(b"\n", position + 1, end)
  return np.asarray(found, np.int64)
