"""Open files, local or in a store, that several threads read at any place."""

import collections
import hashlib
import os
import pathlib
import stat
import weakref
from collections.abc import Iterator
from concurrent import futures
from typing import Any, Protocol

from narvl_jax.data.sources.content import DIGEST_BYTES, content_digest
from narvl_jax.errors import UserError
from narvl_jax.files.stores import is_remote

# Size, modification time in ns, and inode.
Identity = tuple[int, int, int]
BLOCK_BYTES = 1 << 20
# Of a store: large blocks, some of them read ahead.
_STORE_BLOCK_BYTES = 8 << 20
_READ_AHEAD = 8


class OpenedFile(Protocol):
  """A file that is open for reading."""

  def read(self, start: int, length: int) -> bytes:
    """Returns the bytes at a place, fewer at the end of the file.

    Raises:
      FileNotFoundError: a file in a store has been replaced or removed.
    """
    ...

  def blocks(self) -> Iterator[bytes]:
    """Yields the whole content, block by block."""
    ...

  def identity(self) -> Identity:
    """Returns size, modification time in ns and inode, which change with it."""
    ...

  def changed_ns(self) -> int:
    """Returns a time that changes with every write, even if mtime is set."""
    ...

  def digest(self) -> bytes:
    """Returns `DIGEST_BYTES` that identify the content."""
    ...

  def mode(self) -> int:
    """Returns the permissions."""
    ...

  def close(self) -> None:
    """Closes the file."""
    ...


def open_file(path: pathlib.Path) -> OpenedFile:
  """Opens a file.

  Raises:
    UserError: it is not a regular file.
    OSError: it cannot be opened.
  """
  return _StoredFile(path) if is_remote(path) else _LocalFile(path)


class _LocalFile:
  """A descriptor, which is closed with the object."""

  def __init__(self, path: pathlib.Path) -> None:
    # Opening a pipe waits for a writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise UserError(f'"{path}" is not a file; check options.path')
    self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    self.close = weakref.finalize(self, os.close, self._fd)

  def read(self, start: int, length: int) -> bytes:
    data = os.pread(self._fd, length, start)
    # A signal or a network drive may return less at a time.
    while len(data) < length and (
      more := os.pread(self._fd, length - len(data), start + len(data))
    ):
      data += more
    return data

  def blocks(self) -> Iterator[bytes]:
    start = 0
    while block := self.read(start, BLOCK_BYTES):
      yield block
      start += len(block)

  def identity(self) -> Identity:
    status = os.fstat(self._fd)
    return status.st_size, status.st_mtime_ns, status.st_ino

  def changed_ns(self) -> int:
    return os.fstat(self._fd).st_ctime_ns

  def digest(self) -> bytes:
    return content_digest(self.read, self.identity()[0])

  def mode(self) -> int:
    return os.fstat(self._fd).st_mode


class _StoredFile:
  """One version of an object; reading fails once there is another."""

  def __init__(self, path: Any) -> None:
    self._path = path
    self._state = path.state()

  def read(self, start: int, length: int) -> bytes:
    stop = min(start + length, self._state.size)
    return self._path.read_range(start, stop, self._state)

  def blocks(self) -> Iterator[bytes]:
    starts = iter(range(0, self._state.size, _STORE_BLOCK_BYTES))
    with futures.ThreadPoolExecutor(_READ_AHEAD) as pool:
      ahead: collections.deque[futures.Future[bytes]] = collections.deque()
      while True:
        while (
          len(ahead) < _READ_AHEAD and (start := next(starts, None)) is not None
        ):
          ahead.append(pool.submit(self.read, start, _STORE_BLOCK_BYTES))
        if not ahead:
          return
        yield ahead.popleft().result()

  def identity(self) -> Identity:
    number = int.from_bytes(self.digest()[:8], "little") >> 1
    return self._state.size, number, 0

  def changed_ns(self) -> int:
    return 0

  def digest(self) -> bytes:
    version = f"{self._state.version} {self._state.size}".encode()
    return hashlib.blake2b(version, digest_size=DIGEST_BYTES).digest()

  def mode(self) -> int:
    return 0o600

  def close(self) -> None:
    pass
