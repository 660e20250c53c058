"""Temporary files: their names, and removing those of dead processes.

The name of a temporary file contains the machine and the process that write it,
which distinguishes files of killed processes from those being written.
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
from narvl_jax.files.stores import is_remote

# Age after which files of other machines, whose processes cannot be checked,
# are removed. Clocks of a network file system may differ.
_FOREIGN_SECONDS = 24 * 3600.0
# Leaves room for the rest of the name, which is limited to 255 bytes.
_LONGEST_STEM = 160

# .STEM.MACHINE-PROCESS-START-NUMBER.tmp
_NAME = re.compile(
  r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-\d+\.tmp",
  re.DOTALL,
)
# Names of earlier versions: .STEM.PROCESS.part, STEM.rows.idx.XXXXXXXX.tmp
_OLD_NAME = re.compile(
  r".*\.(\d+\.(tmp|part)|rows\.idx\.[a-z0-9_]{8}\.tmp)"
  r"|\.lock\.json\.[0-9a-f]{32}|\.host_\d+\.tmp",
  re.DOTALL,
)
_count = itertools.count()
# Folders that this process has searched.
_searched: set[str] = set()


def temporary_path(path: pathlib.Path) -> pathlib.Path:
  """Returns a name beside `path` that no other writer uses."""
  stem = os.fsdecode(os.fsencode(path.name)[:_LONGEST_STEM])
  pid = os.getpid()
  number = next(_count)
  writer = f"{_machine_code()}-{pid}-{process_start(pid) or 0}-{number}"
  return path.with_name(f".{stem}.{writer}.tmp")


def remove_beside(path: pathlib.Path) -> None:
  """Removes temporary files of dead processes in the folder of a file.

  Old names are kept, since they may be files of the user. Never raises. There
  are none in a store, which writes an object at once.
  """
  if is_remote(path):
    return
  folder = os.path.abspath(path.parent)
  if folder in _searched:
    return
  _searched.add(folder)
  _remove_in(pathlib.Path(folder), _NAME)


def remove_below(folder: pathlib.Path) -> None:
  """Removes temporary files of dead processes below a run folder.

  Skips numbered folders, which are checkpoints. Never raises.
  """
  if is_remote(folder):
    return
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
  if is_remote(path):
    _remove_stored(path)
    return
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
    return
  with contextlib.suppress(OSError):
    path.unlink()


def _remove_stored(path: pathlib.Path) -> None:
  from narvl_jax.files.store_path import StorePath

  with contextlib.suppress(OSError):
    StorePath(path).unlink(missing_ok=True)
    StorePath(path).rmtree(missing_ok=True)


def _is_dead(path: pathlib.Path) -> bool:
  """Returns whether no process can still be writing a temporary file."""
  match = _NAME.fullmatch(path.name)
  if match and match["machine"] == _machine_code() != _code(""):
    return process_start(int(match["pid"])) != match["start"]
  try:
    return time.time() - _last_change(path) > _FOREIGN_SECONDS
  except OSError:
    # It was just renamed to its final name.
    return False


def _last_change(path: pathlib.Path) -> float:
  """Returns the newest time of change of a file, or below a folder."""
  places = [path, *path.rglob("*")] if path.is_dir() else [path]
  return max(place.lstat().st_mtime for place in places)


def _machine_code() -> str:
  return _code(machine())


def _code(name: str) -> str:
  return hashlib.sha256(name.encode()).hexdigest()[:8]
