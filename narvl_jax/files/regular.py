"""Reads files that may have been replaced by pipes, devices or huge files.

Reading a pipe blocks, a device such as /dev/zero never ends, and a huge file
fills the memory. Only regular files up to a limit are opened here.
"""

import contextlib
import errno
import hashlib
import io
import os
import pathlib
import stat
from collections.abc import Iterator

from narvl_jax.files.stores import as_path, is_remote

# Far more than any config, record or vocabulary.
MAX_TEXT_BYTES = 256 << 20


class UnusableFile(OSError):
  """A path is not a regular file, or the file is larger than allowed."""


@contextlib.contextmanager
def open_regular(
  path: str | os.PathLike[str], max_bytes: int | None = None
) -> Iterator[io.BufferedReader]:
  """Opens a regular file, or a link to one, of at most `max_bytes`.

  Raises:
    UnusableFile: it is a folder, a pipe, a device or a socket, or too large.
    OSError: there is no such file, or it cannot be opened.
  """
  path = as_path(path)
  # Before it is opened: opening some devices has side effects.
  _check(path, path.stat(), max_bytes)
  if is_remote(path):
    with path.open("rb") as file:
      yield file
    return
  # Checked again without blocking: it may be replaced by a pipe in between.
  number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  with open(number, "rb") as file:
    _check(path, os.fstat(number), max_bytes)
    yield file


def read_regular(
  path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES
) -> bytes:
  """Returns the bytes of a regular file; raises as `open_regular` does."""
  with open_regular(path, max_bytes) as file:
    return file.read(max_bytes)


def sha256_of(path: str | os.PathLike[str]) -> str:
  """Returns the SHA-256 of a file in hexadecimal."""
  with as_path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def is_regular(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is a regular file or a link to one."""
  try:
    return stat.S_ISREG(as_path(path).stat().st_mode)
  except OSError:
    return False


def _check(
  path: pathlib.Path, status: os.stat_result, max_bytes: int | None
) -> None:
  number = errno.EINVAL
  if stat.S_ISDIR(status.st_mode):
    number, reason = errno.EISDIR, os.strerror(errno.EISDIR)
  elif not stat.S_ISREG(status.st_mode):
    reason = "it is a pipe, a device or a socket, not a regular file"
  elif max_bytes is not None and status.st_size > max_bytes:
    reason = f"it has {status.st_size:,} bytes, the limit is {max_bytes:,}"
  else:
    return
  raise UnusableFile(number, reason, str(path))
