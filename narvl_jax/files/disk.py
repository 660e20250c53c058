"""Files that are written whole, and what to say when a disk fails."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from narvl_jax.errors import UserError
from narvl_jax.files import leftovers

# What a device or a mount says wherever it is met.
_DISK_ERRORS = {
  errno.ENOSPC: "make room",
  errno.EDQUOT: "make room, or have the quota raised",
  errno.EROFS: "make it writable again",
  errno.EIO: "have the disk looked at",
  errno.ESTALE: "mount it again",
  errno.ENOTCONN: "mount it again",
  errno.EFBIG: "raise the largest size of a file (ulimit -f)",
}
# A disk with more free bytes, and more than 1 % of its size, did not fail for
# lack of bytes if it has no more inodes than this, or than 1 % of them.
_AMPLE_BYTES = 1 << 20
_FEW_INODES = 100
# What is about a disk only where the file is one of the run folder's.
_FILE_ERRORS = {
  errno.ENOENT: "bring it back",
  errno.ENOTDIR: "bring it back",
  errno.EACCES: "give this user permission to write there",
  errno.EPERM: "give this user permission to write there",
}


def explain_disk(
  error: BaseException, folder: str | os.PathLike[str] | None = None
) -> str | None:
  """Returns one line for an error that a disk is the cause of, else None.

  Args:
    error: and what it was raised from; libraries wrap what the system says.
    folder: of the run, in which files may vanish or lose their permissions;
      None if there is none.
  """
  run = None if folder is None else pathlib.Path(folder)
  for link in errors_of(error):
    number, path = _number_and_path(link)
    advice = _DISK_ERRORS.get(number)
    if run is not None and path is not None:
      inside = run.absolute() in path.absolute().parents
      advice = advice or (_FILE_ERRORS.get(number) if inside else None)
    if advice is not None:
      return _what_failed(path or run, run, number)
  return None


def _number_and_path(error: BaseException) -> tuple[int, pathlib.Path | None]:
  """Returns the number of an error, 0 if it has none, and its file, if any."""
  if not isinstance(error, OSError) or error.errno is None:
    # What C++ says is a text.
    text = str(error)
    return next((n for n in _DISK_ERRORS if os.strerror(n) in text), 0), None
  name = error.filename
  known = isinstance(name, (str, bytes))
  return error.errno, pathlib.Path(os.fsdecode(name)) if known else None


def _what_failed(
  path: pathlib.Path | None, run: pathlib.Path | None, number: int
) -> str:
  if path is None:
    return f"a file cannot be written or read: {reason_of(number)}"
  if number in _FILE_ERRORS and run is not None and not run.is_dir():
    return (
      f"the folder {run} is gone, in which {path.name} was wanted;"
      f" {_FILE_ERRORS[number]}"
    )
  text = f"{path} cannot be written or read: {reason_of(number, path)}"
  advice = _FILE_ERRORS.get(number)
  return f"{text}; {advice}" if advice else text


def reason_of(number: int, path: pathlib.Path | None = None) -> str:
  """Returns what an error of the system means, and what to do about a disk.

  Args:
    number: of the error.
    path: what could not be written or read; None if that is not known.
  """
  text = os.strerror(number)
  advice = _DISK_ERRORS.get(number)
  with contextlib.suppress(OSError):
    if path is not None and number in _DISK_ERRORS:
      place = free_place(path)
      free = f"{shutil.disk_usage(place).free:,} bytes are free"
      inodes = _free_inodes(place) if number == errno.ENOSPC else None
      if inodes is not None:
        text = "the disk can hold no more files"
        advice = "remove some, or have the number of inodes raised"
        free += f", but {inodes},"
      where = f" in {place}" if place != path.parent else ""
      text += f" ({free}{where})"
  return f"{text}; {advice}" if advice else text


def _free_inodes(place: pathlib.Path) -> str | None:
  """Returns how few inodes a disk has left if these are what it lacks.

  A failed write gives some back before anybody counts them. So few inodes are
  as good as none, if there is clearly room for bytes.

  Returns:
    A text such as "no inode"; None if bytes are what is missing.
  """
  disk = os.statvfs(place)
  free_bytes = disk.f_bavail * disk.f_frsize
  if disk.f_favail == 0 and disk.f_files > 0 and free_bytes > 0:
    return "no inode"
  ample = max(_AMPLE_BYTES, disk.f_blocks * disk.f_frsize // 100)
  if free_bytes <= ample:
    return None
  if disk.f_files == 0:
    # Some file systems, such as Btrfs, do not count them.
    return "it does not tell how many inodes"
  few = max(_FEW_INODES, disk.f_files // 100)
  return f"only {disk.f_favail:,} inodes" if disk.f_favail <= few else None


def free_place(path: pathlib.Path) -> pathlib.Path:
  """Returns the nearest folder above a path that there is."""
  place = path.absolute()
  while not place.is_dir() and place != place.parent:
    place = place.parent
  return place


def errors_of(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and those that it was raised from."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


@contextlib.contextmanager
def atomically(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a file, or folder, to write that takes the place of `path` when done.

  If the body fails, `path` stays as it was. A device or a pipe, which must not
  be replaced, is given as it is. The folder around it must exist: one that was
  renamed meanwhile is not made anew.

  Raises:
    OSError: it cannot be written.
  """
  if is_stream(path):
    yield path
    return
  if path.is_symlink() and path.exists():
    path = path.resolve()
  leftovers.remove_beside(path)
  temporary = leftovers.temporary_path(path)
  try:
    yield temporary
    # Otherwise a machine that fails now may leave an empty file.
    _sync(temporary)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):
      _sync(path.parent)
  except OSError as error:
    if str(error.filename) == str(temporary):
      # The user knows the file, and not its temporary name.
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise
  finally:
    # It is gone if all went well, and may never have been made.
    leftovers.remove(temporary)


def is_stream(path: pathlib.Path) -> bool:
  """Returns whether a path is a device or a pipe, such as /dev/stdout."""
  if path.absolute().parts[:3] == ("/", "dev", "shm"):
    return False
  special = path.absolute().parts[:2] in (("/", "dev"), ("/", "proc"))
  return path.exists() and (special or not (path.is_file() or path.is_dir()))


def _sync(path: pathlib.Path) -> None:
  """Has the disk write a file, or the names in a folder."""
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)


@contextlib.contextmanager
def replacing(
  path: pathlib.Path, *, inside: pathlib.Path | None = None
) -> Iterator[pathlib.Path]:
  """Does what `atomically` does, in a folder that is made if need be.

  Args:
    path: to be written.
    inside: a folder above it that is not made again if it has vanished, such
      as that of a run.

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
    raise UserError(f'cannot write "{path}": {reason}') from error


def write_text(
  path: pathlib.Path, text: str, *, inside: pathlib.Path | None = None
) -> None:
  """Writes a file so that readers see the old or the new one, never a part.

  Args:
    path: to be written.
    text: the content.
    inside: see `replacing`.

  Raises:
    UserError: it cannot be written.
  """
  with replacing(path, inside=inside) as temporary:
    temporary.write_text(text, encoding="utf-8")
