"""Checks the files and folders that flags name, before any work is done."""

import errno
import os
import pathlib
import sys
from collections.abc import Iterator

from absl import flags

from narvl_jax.errors import UserError
from narvl_jax.files import leftovers
from narvl_jax.files.disk import is_stream
from narvl_jax.files.disk_errors import errors_of, free_place, reason_of
from narvl_jax.files.schemes import StoreError
from narvl_jax.files.stores import as_path, check_address, is_remote

# Flags of all commands that contain a path.
PATH_FLAGS = (
  *("workdir", "to", "from", "teacher", "nar", "ar", "runs", "results"),
  *("folder", "vocabulary", "answers", "image", "overlay", "hlo", "json"),
  *("png", "cider_df", "annotations", "official", "store"),
  "compilation_cache",
)
# If these are empty, nothing is written.
_MAY_BE_EMPTY = ("png", "json")
_LONGEST_SHOWN = 120
# Errors of paths that cannot exist.
_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.ELOOP)


def check_flags() -> None:
  """Raises UserError if a path flag of this command is empty or impossible."""
  for name, value in _given_flags():
    if not value.strip() and name not in _MAY_BE_EMPTY:
      raise UserError(
        f'--{name}="{value}" names nothing; give a path, such as'
        f" --{name}=. for the current folder, or leave the flag out"
      )
    if value:
      check_possible(f"--{name}", value)


def check_possible(flag: str, value: str) -> None:
  """Checks that a path can exist.

  Args:
    flag: its name in messages, such as `--to`.

  Raises:
    UserError: a name in it is too long, or its links form a cycle; it is in an
      unknown store.
  """
  check_address(f"{flag}=", value)
  if is_remote(value):
    return
  number = 0
  try:
    os.stat(value)
  except OSError as error:
    number = error.errno
  # The system reports a long name only if the folders before it exist.
  place = free_place(pathlib.Path(value)) if number == errno.ENOENT else "/"
  longest = os.pathconf(place, "PC_NAME_MAX")
  if any(len(os.fsencode(x)) > longest for x in pathlib.Path(value).parts):
    number = errno.ENAMETOOLONG
  if number in _IMPOSSIBLE:
    raise UserError(f'{flag}="{_short(value)}": {os.strerror(number)}')


def check_folder(flag: str, value: str | os.PathLike[str]) -> None:
  """Checks that files can be written below a folder, which need not exist.

  Creates a probe: permissions do not show read-only disks, quotas, or file
  systems such as /proc.

  Raises:
    UserError: it is a file or below one, or cannot be written.
  """
  check_possible(flag, os.fspath(value))
  _check_folder(flag, f"{flag}={value}", as_path(value).absolute())


def check_file(flag: str, value: str | os.PathLike[str]) -> None:
  """Checks that a file can be written, in a folder that need not exist.

  Raises:
    UserError: it is a folder, or its folder cannot be written.
  """
  check_possible(flag, os.fspath(value))
  path = as_path(value)
  if path.is_dir():
    raise UserError(f"{flag}={value} is a folder; give a file in it")
  if not is_stream(path):
    shown = f"{flag}={value}: {path.parent}"
    _check_folder(flag, shown, path.parent.absolute())


def _check_folder(flag: str, shown: str, folder: pathlib.Path) -> None:
  if is_remote(folder):
    _check_store(flag, shown, folder)
    return
  place = folder
  while not os.path.lexists(place):
    place = place.parent
  if not place.is_dir():
    what = "is" if place == folder else f"is below {place},"
    raise UserError(f"{shown} {what} a file, not a folder")
  probe = leftovers.temporary_path(place / "probe")
  try:
    probe.mkdir()
    probe.rmdir()
    reason = ""
  except PermissionError:
    reason = f"no permission for {place}"
  except OSError as error:
    reason = reason_of(error.errno or 0, place)
  if not reason and not os.access(place, os.W_OK | os.X_OK):
    reason = f"no permission for {place}"
  if reason:
    raise UserError(f"{shown} cannot be written: {reason}; use another {flag}")


def _check_store(flag: str, shown: str, folder: pathlib.Path) -> None:
  probe = folder / ".probe"
  try:
    if folder.is_file():
      raise UserError(f"{shown} is a file, not a folder")
    probe.write_bytes(b"")
    probe.unlink(missing_ok=True)
  except StoreError as error:
    raise UserError(f"{shown}: {error.strerror}") from error
  except FileNotFoundError as error:
    raise UserError(
      f"{shown}: there is no bucket {folder.parts[2]}; create it, or use"
      f" another {flag}"
    ) from error


def explain_path(error: BaseException) -> str | None:
  """Returns one line for an error at a path of the user, otherwise None."""
  for link in errors_of(error):
    if not isinstance(link, OSError) or not isinstance(link.filename, str):
      continue
    path = _absolute(link.filename)
    for flag, value in _given():
      given = _absolute(value)
      if path != given and not {path, given} & {*path.parents, *given.parents}:
        continue
      where = "" if path == given else f' at "{_short(str(path))}"'
      return f'{flag}"{_short(value)}": {link.strerror}{where}'
  return None


def _absolute(text: str) -> pathlib.Path:
  if is_remote(text):
    return as_path(text)
  return pathlib.Path(os.path.abspath(text))


def _given() -> Iterator[tuple[str, str]]:
  """Yields each path of the command line after its name in messages."""
  for name, value in _given_flags():
    yield f"--{name}=", value
  if flags.FLAGS.is_parsed():
    for value in sys.argv[1:]:
      if not value.startswith("-"):
        yield "", value


def _given_flags() -> Iterator[tuple[str, str]]:
  for name in PATH_FLAGS:
    if name in flags.FLAGS and flags.FLAGS[name].present:
      value = flags.FLAGS[name].value
      if isinstance(value, str):
        yield name, value


def _short(text: str) -> str:
  return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
