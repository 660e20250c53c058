"""Temporary files: their names, and removing those of dead processes.

The name of a temporary file holds the machine and the process that write it,
so that a later process can tell what a killed one left behind from what a live
one is writing.
"""

import contextlib
import hashlib
import itertools
import os
import pathlib
import re
import shutil
import time

from narvl_jax.files.processes import machine, process_start

# Files of machines whose processes cannot be seen are left alone for so long
# after they were last changed. Clocks of a network file system may differ.
_FOREIGN_SECONDS = 24 * 3600.0
# Room for the rest of the name below the limit of 255 bytes.
_LONGEST_STEM = 160

# .STEM.MACHINE-PROCESS-START-NUMBER.tmp
_NAME = re.compile(
  r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-\d+\.tmp",
  re.DOTALL,
)
# As earlier versions named them: .STEM.PROCESS.part, STEM.rows.idx.XXXXXXXX.tmp
_OLD_NAME = re.compile(
  r".*\.(\d+\.(tmp|part)|rows\.idx\.[a-z0-9_]{8}\.tmp)"
  r"|\.lock\.json\.[0-9a-f]{32}|\.host_\d+\.tmp",
  re.DOTALL,
)
_count = itertools.count()
# Each folder is searched once by a process.
_searched: set[str] = set()


def temporary_path(path: pathlib.Path) -> pathlib.Path:
  """Returns a name beside `path` that no other writer uses."""
  stem = os.fsdecode(os.fsencode(path.name)[:_LONGEST_STEM])
  pid = os.getpid()
  number = next(_count)
  writer = f"{_machine_code()}-{pid}-{process_start(pid) or 0}-{number}"
  return path.with_name(f".{stem}.{writer}.tmp")


def remove_beside(path: pathlib.Path) -> None:
  """Removes what dead processes left beside a file that is to be written.

  Only files of these names are touched: the folder may hold the user's own.
  Never raises: what cannot be removed stays.
  """
  folder = os.path.abspath(path.parent)
  if folder in _searched:
    return
  _searched.add(folder)
  _remove_in(pathlib.Path(folder), _NAME)


def remove_below(folder: pathlib.Path) -> None:
  """Removes what dead processes left in a folder that is ours, and below it.

  Never raises: what cannot be removed stays.

  Args:
    folder: such as that of a run; numbered folders, which are checkpoints, are
      not entered.
  """
  for place, names, _ in os.walk(folder):
    _remove_in(pathlib.Path(place), _NAME, _OLD_NAME)
    names[:] = [x for x in names if not x.isdigit() and not x.startswith(".")]


def _remove_in(folder: pathlib.Path, *patterns: re.Pattern[str]) -> None:
  with contextlib.suppress(OSError):
    for name in os.listdir(folder):
      if any(x.fullmatch(name) for x in patterns) and _is_dead(folder / name):
        remove(folder / name)


def remove(path: pathlib.Path) -> None:
  """Removes a file or a folder; never raises."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
    return
  with contextlib.suppress(OSError):
    path.unlink()


def _is_dead(path: pathlib.Path) -> bool:
  """Returns whether nobody can still be writing a temporary file."""
  match = _NAME.fullmatch(path.name)
  if match and match["machine"] == _machine_code() != _code(""):
    return process_start(int(match["pid"])) != match["start"]
  try:
    return time.time() - _last_change(path) > _FOREIGN_SECONDS
  except OSError:
    # It has just become the file that it was written for.
    return False


def _last_change(path: pathlib.Path) -> float:
  """Returns when a file, or anything below a folder, was last changed."""
  places = [path, *path.rglob("*")] if path.is_dir() else [path]
  return max(place.lstat().st_mtime for place in places)


def _machine_code() -> str:
  return _code(machine())


def _code(name: str) -> str:
  return hashlib.sha256(name.encode()).hexdigest()[:8]
