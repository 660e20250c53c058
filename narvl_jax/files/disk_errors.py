"""Explains errors of a disk in one line."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from narvl_jax.files.schemes import StoreError
from narvl_jax.files.stores import as_path, is_remote

# Errors of a device or a mount, wherever they occur.
_DISK_ERRORS = {
  errno.ENOSPC: "make room",
  errno.EDQUOT: "make room, or have the quota raised",
  errno.EROFS: "make it writable again",
  errno.EIO: "check the disk",
  errno.ESTALE: "mount it again",
  errno.ENOTCONN: "mount it again",
  errno.EFBIG: "raise the largest size of a file (ulimit -f)",
}
# Errors that matter only for files in the run folder.
_FILE_ERRORS = {
  errno.ENOENT: "restore it",
  errno.ENOTDIR: "restore it",
  errno.EACCES: "give this user permission to write there",
  errno.EPERM: "give this user permission to write there",
}
# A disk with more free bytes than this, and than 1 %, lacks inodes if it has at
# most this many, or 1 %.
_AMPLE_BYTES = 1 << 20
_FEW_INODES = 100


def explain_disk(
  error: BaseException, folder: str | os.PathLike[str] | None = None
) -> str | None:
  """Returns one line for an error of a disk, None for any other error.

  Args:
    error: checked with its causes, since libraries wrap system errors.
    folder: the run folder, in which missing files and permissions count too;
      None if there is none.
  """
  run = None if folder is None else as_path(folder)
  for link in errors_of(error):
    if isinstance(link, StoreError):
      return f"{link.filename} cannot be written or read: {link.strerror}"
    number, path = _number_and_path(link)
    advice = _DISK_ERRORS.get(number)
    if run is not None and path is not None:
      inside = run.absolute() in path.absolute().parents
      advice = advice or (_FILE_ERRORS.get(number) if inside else None)
    if advice is not None:
      return _describe(path or run, run, number)
  return None


def errors_of(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and its causes."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


def _number_and_path(error: BaseException) -> tuple[int, pathlib.Path | None]:
  """Returns the errno of an error, or 0, and its file, if it has one."""
  if not isinstance(error, OSError) or error.errno is None:
    # Errors of C++ are texts.
    text = str(error)
    return next((n for n in _DISK_ERRORS if os.strerror(n) in text), 0), None
  name = error.filename
  known = isinstance(name, (str, bytes))
  if not known:
    return error.errno, None
  name = os.fsdecode(name)
  return error.errno, as_path(name) if is_remote(name) else pathlib.Path(name)


def _describe(
  path: pathlib.Path | None, run: pathlib.Path | None, number: int
) -> str:
  if path is None:
    return f"a file cannot be written or read: {reason_of(number)}"
  if number in _FILE_ERRORS and run is not None and not run.is_dir():
    return (
      f"the folder {run} no longer exists; {path.name} was expected in it:"
      f" {_FILE_ERRORS[number]}"
    )
  text = f"{path} cannot be written or read: {reason_of(number, path)}"
  advice = _FILE_ERRORS.get(number)
  return f"{text}; {advice}" if advice else text


def reason_of(number: int, path: pathlib.Path | None = None) -> str:
  """Returns the text of an errno, with the free space and advice.

  Args:
    path: the file that could not be written or read, if known.
  """
  text = os.strerror(number)
  advice = _DISK_ERRORS.get(number)
  with contextlib.suppress(OSError):
    if path is not None and not is_remote(path) and number in _DISK_ERRORS:
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
  """Returns the free inodes, such as "no inode"; None if bytes are lacking.

  A failed write frees some inodes before they are counted here, so a few count
  as none if there is clearly room for bytes.
  """
  disk = os.statvfs(place)
  free_bytes = disk.f_bavail * disk.f_frsize
  if disk.f_favail == 0 and disk.f_files > 0 and free_bytes > 0:
    return "no inode"
  if free_bytes <= max(_AMPLE_BYTES, disk.f_blocks * disk.f_frsize // 100):
    return None
  if disk.f_files == 0:
    # Some file systems, such as Btrfs, do not count inodes.
    return "an unknown number of inodes"
  few = max(_FEW_INODES, disk.f_files // 100)
  return f"only {disk.f_favail:,} inodes" if disk.f_favail <= few else None


def free_place(path: pathlib.Path) -> pathlib.Path:
  """Returns the nearest existing folder above a path."""
  place = path.absolute()
  while not place.is_dir() and place != place.parent:
    place = place.parent
  return place
