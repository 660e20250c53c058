"""Files that are written whole, and what to say when a disk fails."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from narvl_jax.errors import UserError

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
  for link in _chain(error):
    number, path = _number_and_path(link)
    advice = _DISK_ERRORS.get(number)
    if run is not None and path is not None:
      inside = run.absolute() in path.absolute().parents
      advice = advice or (_FILE_ERRORS.get(number) if inside else None)
    if advice is not None:
      return f"{_what_failed(path or run, run, number)}; {advice}"
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
    return f"a file cannot be written or read: {os.strerror(number)}"
  if number in _FILE_ERRORS and run is not None and not run.is_dir():
    return f"the folder {run} is gone, in which {path.name} was wanted"
  text = f"{path} cannot be written or read: {os.strerror(number)}"
  place = free_place(path)
  with contextlib.suppress(OSError):
    free = shutil.disk_usage(place).free
    text += f" ({free:,} bytes are free in {place})"
  return text


def free_place(path: pathlib.Path) -> pathlib.Path:
  """Returns the nearest folder above a path that there is."""
  place = path.absolute()
  while not place.is_dir() and place != place.parent:
    place = place.parent
  return place


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a file to write that takes the place of `path` when it is done.

  Makes the folder if need be. If the body fails, `path` stays as it was.

  Raises:
    UserError: the folder or the file cannot be written.
  """
  # The process id keeps two writers from sharing a temporary file.
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    os.replace(temporary, path)
  except OSError as error:
    reason = error.strerror or str(error)
    if error.errno in _DISK_ERRORS:
      free = shutil.disk_usage(free_place(path)).free
      reason += f" ({free:,} bytes are free); {_DISK_ERRORS[error.errno]}"
    raise UserError(f'cannot write "{path}": {reason}') from error
  finally:
    # It is gone if all went well, and may never have been made.
    with contextlib.suppress(OSError):
      temporary.unlink()


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file so that readers see the old or the new one, never a part.

  Raises:
    UserError: it cannot be written.
  """
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")
