"""Writes files atomically: readers see the old or the new file."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from narvl_jax.errors import UserError
from narvl_jax.files import leftovers
from narvl_jax.files.disk_errors import reason_of
from narvl_jax.files.schemes import StoreError
from narvl_jax.files.stores import is_remote
from narvl_jax.terminal.text import readable_json


@contextlib.contextmanager
def atomically(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary file, or folder, that replaces `path` at the end.

  If the body fails, `path` is unchanged. A device or a pipe, which must not be
  replaced, is yielded itself. The parent folder must exist; it is not created,
  since the user may have renamed it. In a store, the files of a folder are
  replaced one by one.

  Raises:
    OSError: it cannot be written.
  """
  if is_remote(path):
    with _put_at_end(path) as temporary:
      yield temporary
    return
  if is_stream(path):
    yield path
    return
  if path.is_symlink() and path.exists():
    path = path.resolve()
  leftovers.remove_beside(path)
  temporary = leftovers.temporary_path(path)
  try:
    yield temporary
    # Otherwise a power failure may leave an empty file.
    _sync(temporary)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):
      _sync(path.parent)
  except OSError as error:
    if str(error.filename) == str(temporary):
      # Users do not know the temporary name.
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise
  finally:
    leftovers.remove(temporary)


@contextlib.contextmanager
def _put_at_end(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary local file, or folder, that is put into a store."""
  from narvl_jax.files.store_path import StorePath

  with tempfile.TemporaryDirectory(prefix="narvl_jax_") as folder:
    temporary = pathlib.Path(folder) / path.name
    yield temporary
    StorePath(path).put(temporary)


@contextlib.contextmanager
def replacing(
  path: pathlib.Path, *, inside: pathlib.Path | None = None
) -> Iterator[pathlib.Path]:
  """Calls `atomically` in a folder that is created if needed.

  Args:
    inside: an ancestor that is not created again if it has vanished, such as
      the run folder.

  Raises:
    UserError: the folder or the file cannot be written.
  """
  try:
    if inside is None:
      path.parent.mkdir(parents=True, exist_ok=True)
    elif path.parent != inside:
      path.parent.mkdir(exist_ok=True)
    with atomically(path) as temporary:
      yield temporary
  except OSError as error:
    reason = reason_of(error.errno, path) if error.errno else str(error)
    if isinstance(error, StoreError):
      reason = str(error.strerror)
    raise UserError(f'cannot write "{path}": {reason}') from error


def write_text(
  path: pathlib.Path, text: str, *, inside: pathlib.Path | None = None
) -> None:
  """Writes a file as `replacing` does, in UTF-8.

  Raises:
    UserError: it cannot be written.
  """
  with replacing(path, inside=inside) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(
  path: pathlib.Path,
  value: Any,
  *,
  indent: int | None = 2,
  inside: pathlib.Path | None = None,
) -> None:
  """Writes a JSON file as `write_text` does; see `readable_json`."""
  write_text(path, readable_json(value, indent=indent) + "\n", inside=inside)


def append(path: pathlib.Path, data: bytes, *, sync: bool = False) -> None:
  """Appends to a file; in a store, the whole object is written again.

  Args:
    sync: whether a local file is flushed to the disk.

  Raises:
    OSError: it cannot be written.
  """
  if is_remote(path):
    with contextlib.suppress(FileNotFoundError):
      data = path.read_bytes() + data
    path.write_bytes(data)
    return
  with path.open("ab") as file:
    file.write(data)
    file.flush()
    if sync:
      os.fsync(file.fileno())


def files_below(folder: pathlib.Path) -> list[str]:
  """Returns the names of the files below a folder, relative to it."""
  if is_remote(folder):
    found = folder.rglob("*")
    return [x.relative_to(folder).as_posix() for x in found]
  names = []
  for place, _, files in os.walk(folder):
    below = pathlib.Path(place).relative_to(folder).as_posix()
    names += [name if below == "." else f"{below}/{name}" for name in files]
  return names


def size_and_time(folder: pathlib.Path) -> tuple[int, float]:
  """Returns the bytes in a folder, and the Unix time of its last change.

  Raises:
    FileNotFoundError: there is no such folder.
  """
  if is_remote(folder):
    from narvl_jax.files.store_path import StorePath

    return StorePath(folder).size_and_time()
  changed = folder.stat().st_mtime
  files = (x for x in folder.rglob("*") if x.is_file())
  return sum(x.stat().st_size for x in files), changed


def is_stream(path: pathlib.Path) -> bool:
  """Returns whether a path is a device or a pipe, such as /dev/stdout."""
  if is_remote(path):
    return False
  if path.absolute().parts[:3] == ("/", "dev", "shm"):
    return False
  special = path.absolute().parts[:2] in (("/", "dev"), ("/", "proc"))
  return path.exists() and (special or not (path.is_file() or path.is_dir()))


def _sync(path: pathlib.Path) -> None:
  """Flushes a file, or the entries of a folder, to the disk."""
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)
