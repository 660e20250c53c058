"""Files that one of several processes creates, then keeps writing."""

import contextlib
import errno
import fcntl
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator

from narvl_jax.files import side_files
from narvl_jax.files.regular import open_regular
from narvl_jax.files.stores import is_remote

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

# Contents, possibly damaged -> whether they are those of the caller.
IsOwn = Callable[[bytes], bool]


class LocalClaim:
  """A file on a disk: created by a link, and changed under a lock."""

  def __init__(self, path: pathlib.Path, longest: int) -> None:
    """Names the file.

    Args:
      longest: bytes that are read; another file in its place may be huge.
    """
    self._path, self._longest = path, longest
    self._number = uuid.uuid4().hex

  def read(self) -> bytes | None:
    """Returns the contents; None without a file."""
    try:
      side_files.make_way(self._path)
      with open_regular(self._path) as file:
        return file.read(self._longest)
    except FileNotFoundError:
      return None

  def create(self, data: bytes) -> bool:
    """Creates the file atomically; returns False if there is one."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._alone(), self._new_file(data) as own:
      side_files.make_way(self._path)
      try:
        os.link(own, self._path)
      except FileExistsError:
        return False
      except OSError as error:
        if error.errno not in _NO_LINKS:
          raise
        # Some mounted buckets do not support links.
        if self._path.exists():
          return False
        own.replace(self._path)
      return True

  def replace(self, found: bytes, data: bytes) -> bool:
    """Replaces the contents `found`; returns False if they have changed."""
    with self._alone(), self._new_file(data) as own:
      if self.read() != found:
        return False
      own.replace(self._path)
      return True

  def renew(self, data: bytes, is_own: IsOwn) -> bool:
    """Writes over the contents; returns False if they are not own ones.

    Raises:
      FileNotFoundError: the file was removed.
    """
    with self._path.open("r+b") as file:
      if not is_own(file.read()):
        return False
      file.seek(0)
      file.write(data)
    return True

  def remove(self, is_own: IsOwn) -> None:
    """Removes the file if its contents are own ones."""
    with self._alone():
      if is_own(self.read() or b""):
        self._path.unlink()

  @contextlib.contextmanager
  def _new_file(self, data: bytes) -> Iterator[pathlib.Path]:
    own = self._path.with_name(f".{self._path.name}.{self._number}")
    try:
      own.write_bytes(data)
      yield own
    finally:
      own.unlink(missing_ok=True)

  @contextlib.contextmanager
  def _alone(self) -> Iterator[None]:
    """Excludes other processes that change the file.

    Where the file system has no `flock`, `renew` notices another writer.
    """
    folder = os.open(self._path.parent, os.O_RDONLY)
    try:
      with contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX)
      yield
    finally:
      os.close(folder)


class StoreClaim:
  """An object in a store, written only if no other process has written it.

  The methods are those of `LocalClaim`.
  """

  def __init__(self, path: pathlib.Path) -> None:
    # Imports fsspec.
    from narvl_jax.files.store_path import StorePath

    self._path = StorePath(path)

  def read(self) -> bytes | None:
    """Returns the contents; None without an object."""
    found = self._path.read_stored()
    return None if found is None else found.data

  def create(self, data: bytes) -> bool:
    """Creates the object; returns False if there is one."""
    return self._path.write_if(data, None)

  def replace(self, found: bytes, data: bytes) -> bool:
    """Replaces the contents `found`; returns False if they have changed."""
    stored = self._path.read_stored()
    if stored is None or stored.data != found:
      return False
    return self._path.write_if(data, stored.version)

  def renew(self, data: bytes, is_own: IsOwn) -> bool:
    """Writes over the contents; returns False if they are not own ones.

    Raises:
      FileNotFoundError: the object was removed.
    """
    stored = self._path.read_stored()
    if stored is None:
      raise FileNotFoundError(errno.ENOENT, "removed", str(self._path))
    if not is_own(stored.data):
      return False
    return self._path.write_if(data, stored.version)

  def remove(self, is_own: IsOwn) -> None:
    """Removes the object if its contents are own ones."""
    if is_own(self.read() or b""):
      self._path.unlink(missing_ok=True)


def claim(path: pathlib.Path, longest: int) -> LocalClaim | StoreClaim:
  """Returns the file, or object, with which processes exclude one another."""
  return StoreClaim(path) if is_remote(path) else LocalClaim(path, longest)
