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
  error: BaseException, folder: str | os.PathLike[str]
) -> str | None:
  """Returns one line for an error that a disk is the cause of, else None.

  Args:
    error: and what it was raised from; libraries wrap what the system says.
    folder: of the run, in which files may vanish or lose their permissions.
  """
  folder = pathlib.Path(folder)
  for link in _chain(error):
    number = link.errno if isinstance(link, OSError) else None
    if number is None:
      text = str(link)
      number = next((n for n in _DISK_ERRORS if os.strerror(n) in text), None)
    name = getattr(link, "filename", None)
    if isinstance(name, bytes):
      name = os.fsdecode(name)
    path = pathlib.Path(name) if isinstance(name, str) else folder
    advice = _DISK_ERRORS.get(number or 0)
    if advice is None and number in _FILE_ERRORS and isinstance(name, str):
      inside = path.absolute().is_relative_to(folder.absolute())
      advice = _FILE_ERRORS[number] if inside else None
    if number is not None and advice is not None:
      return f"{_what_failed(path, folder, number)}; {advice}"
  return None


def _what_failed(path: pathlib.Path, folder: pathlib.Path, number: int) -> str:
  if number in (errno.ENOENT, errno.ENOTDIR) and not folder.is_dir():
    return f"the folder {folder} is gone, in which {path.name} was wanted"
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
