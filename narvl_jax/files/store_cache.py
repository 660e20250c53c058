"""Local copies of files in stores, which processes and runs share.

A copy belongs to the path, version and size of an object. The least recently
used copies are removed when there are more than `NARVL_JAX_CACHE_GB` gigabytes
of them, 50 by default; 0 keeps none.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

from narvl_jax.errors import UserError
from narvl_jax.files import leftovers
from narvl_jax.files.stores import as_path, cache_folder, is_remote

VARIABLE = "NARVL_JAX_CACHE_GB"
_DEFAULT_GB = 50.0
# Of the limit: a larger file is not worth the place of so many others.
_LARGEST_READ = 0.1
# Of the limit: what a process writes before it looks for copies to remove.
_LOOK_AFTER = 0.05
_KEPT = 0.9
# Files whose state is remembered, so that later epochs do not ask again.
_REMEMBERED = 1 << 18

# Bytes that this process may write before it looks for copies to remove.
_unchecked = 0
_looking = threading.Lock()


def limit_bytes() -> int:
  """Returns the size of all copies.

  Raises:
    UserError: the variable is not a number.
  """
  text = os.environ.get(VARIABLE, "")
  try:
    return int(float(text or _DEFAULT_GB) * 1e9)
  except (ValueError, OverflowError) as e:
    raise UserError(
      f"{VARIABLE}={text} is not a number of gigabytes; set it to a number such"
      " as 50, or to 0 to keep no local copies"
    ) from e


def check_room(what: str, size: int) -> None:
  """Raises UserError if files of `size` bytes exceed the limit of copies."""
  if size > limit_bytes():
    raise UserError(
      f"{what} have {size / 1e9:,.1f} GB, which are copied to this machine; set"
      f" {VARIABLE} to more, or read TSV files, which are not copied"
    )


def file_state(path: pathlib.Path) -> tuple[int, int | str]:
  """Returns size and time of change, or in a store the version, of a file."""
  if is_remote(path):
    size, version = _state(path)
    return size, version
  status = path.stat()
  return status.st_size, status.st_mtime_ns


def local_copy(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a local file with the content of a file; a local file itself.

  The copy may be removed later: open it at once.

  Raises:
    OSError: it cannot be read, or not be copied.
  """
  place = as_path(path)
  if not is_remote(place):
    return place
  return _copied(place, _state(place))


def read_bytes(path: pathlib.Path, max_bytes: int) -> bytes:
  """Returns the content of a file in a store.

  Whether the file has changed is asked once per process.

  Raises:
    OSError: it cannot be read, or is larger than `max_bytes`.
  """
  limit = limit_bytes()
  if not limit:
    return _checked(path, path.read_bytes(), max_bytes)
  state = _remembered(str(path))
  if state.size > max_bytes or state.size > _LARGEST_READ * limit:
    return _checked(path, path.read_bytes(), max_bytes)
  copy = _place(path, state)
  with contextlib.suppress(OSError):
    data = copy.read_bytes()
    if len(data) == state.size:
      os.utime(copy)
      return data
  data = path.read_bytes()
  if len(data) == state.size:
    # A full disk, for example, only makes the next epoch slower.
    with contextlib.suppress(OSError), _new(copy, state.size) as temporary:
      temporary.write_bytes(data)
  return data


def _checked(path: pathlib.Path, data: bytes, max_bytes: int) -> bytes:
  if len(data) > max_bytes:
    reason = f"it has {len(data):,} bytes, the limit is {max_bytes:,}"
    raise OSError(0, reason, str(path))
  return data


def _state(path: Any) -> Any:
  return path.state()


@functools.lru_cache(_REMEMBERED)
def _remembered(path: str) -> Any:
  return _state(as_path(path))


def _place(path: pathlib.Path, state: Any) -> pathlib.Path:
  name = f"{path} {state.version} {state.size}"
  digest = hashlib.sha256(name.encode()).hexdigest()[:32]
  # Readers tell formats by the suffix.
  file = digest + path.suffix
  return cache_folder() / "stores" / digest[:2] / file


def _copied(path: Any, state: Any) -> pathlib.Path:
  copy = _place(path, state)
  with contextlib.suppress(OSError):
    if copy.stat().st_size == state.size:
      os.utime(copy)
      return copy
  with _new(copy, state.size) as temporary:
    path.get(temporary)
    if temporary.stat().st_size != state.size:
      raise OSError(0, "it changed while it was copied", str(path))
  return copy


@contextlib.contextmanager
def _new(copy: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
  """Yields a temporary file that becomes the copy.

  Unlike `disk.atomically` it does not wait for the disk: a copy of another size
  is made again.
  """
  global _unchecked
  copy.parent.mkdir(parents=True, exist_ok=True)
  leftovers.remove_beside(copy)
  temporary = leftovers.temporary_path(copy)
  try:
    yield temporary
    os.replace(temporary, copy)
  finally:
    leftovers.remove(temporary)
  _unchecked -= size
  if _unchecked < 0 and _looking.acquire(blocking=False):
    try:
      _unchecked = int(_LOOK_AFTER * limit_bytes())
      _make_room(cache_folder() / "stores", limit_bytes())
    finally:
      _looking.release()


def _make_room(folder: pathlib.Path, limit: int) -> None:
  """Removes the least recently used copies if there are too many bytes."""
  with open(folder / "lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return  # Another process is at it.
    copies = []
    for place, _, names in os.walk(folder):
      for name in names:
        with contextlib.suppress(OSError):
          path = pathlib.Path(place) / name
          status = path.lstat()
          # Temporary files belong to the processes that write them.
          if path.parent != folder and not name.startswith("."):
            copies.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in copies)
    if total <= limit:
      return
    for _, size, path in sorted(copies):
      path.unlink(missing_ok=True)
      total -= size
      if total <= _KEPT * limit:
        break
