"""The option `path` of sources: the files of a split."""

import difflib
import glob
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from narvl_jax.errors import UserError, did_you_mean

# Suffix -> place and content of a mark in such files, command that unpacks.
_COMPRESSED = {
  ".gz": (0, b"\x1f\x8b", "gunzip -k"),
  ".bz2": (4, b"1AY&SY", "bunzip2 -k"),
  ".xz": (0, b"\xfd7zXZ\0", "unxz -k"),
  ".zst": (0, b"\x28\xb5\x2f\xfd", "unzstd"),
  ".zip": (0, b"PK\x03\x04", "unzip"),
}
START_BYTES = 10
PathOption = str | Sequence[str] | Mapping[str, Any] | None


def resolve(path: PathOption, split: str, *, source: str) -> list[pathlib.Path]:
  """Returns the files of a split, at least one; all of them exist.

  Args:
    path: a file, several, or a mapping from splits to these. `{split}` in a
      name becomes the split. A glob pattern means all files that match it,
      sorted by name.

  Raises:
    UserError: there is no such file, or the mapping lacks the split.
  """
  names = path
  # A ConfigDict is not a Mapping but has its methods.
  if path is not None and hasattr(path, "items"):
    options: Any = path
    if split not in options:
      raise UserError(
        f'{source}: options.path has no files for split "{split}".'
        f"{did_you_mean(split, options)} Set options.path.{split}"
      )
    names = options[split]
  if isinstance(names, str):
    names = (names,)
  if not names or not all(isinstance(name, str) and name for name in names):
    raise UserError(
      f"{source}: options.path is {path!r}; it must name a file, such as"
      " --config.data.train.NAME.options.path=FILE"
    )
  files = []
  for name in names:
    files += _expand(str(name).replace("{split}", split), split, source)
  return files


def with_home(name: str) -> pathlib.Path:
  """Returns a path; "~" and "~/..." start at the home folder.

  "~someone" is an ordinary name, because that home depends on the machine.
  """
  return pathlib.Path(
    os.path.expanduser(name) if name == "~" or name.startswith("~/") else name
  )


def cache_folder() -> pathlib.Path:
  """Returns the folder of this user's cached indices."""
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return with_home(cache) / "narvl_jax"


def check_uncompressed(name: str) -> None:
  """Raises `UserError` for the name of a compressed file."""
  path = pathlib.Path(name)
  if path.suffix in _COMPRESSED:
    *_, command = _COMPRESSED[path.suffix]
    raise UserError(
      f'"{name}" is compressed; records are read in any order, so unpack it'
      f" first: {command} {name}, and give {path.with_suffix('')}"
    )


def check_start(path: str | os.PathLike[str], start: bytes) -> None:
  """Raises `UserError` if a file starts like a compressed one.

  Args:
    path: name of the file.
    start: its first `START_BYTES`.
  """
  for suffix, (place, mark, command) in _COMPRESSED.items():
    if start[place:].startswith(mark):
      raise UserError(
        f'"{path}" is compressed ({suffix}); rename it to {path}{suffix} and'
        f" unpack it first: {command} {path}{suffix}"
      )


def _expand(name: str, split: str, source: str) -> list[pathlib.Path]:
  if "://" in name:
    raise UserError(
      f'{source}: options.path "{name}" is an address; it must be a file of'
      " this machine: copy or mount it first"
    )
  path = with_home(name)
  if path.is_dir():
    raise UserError(
      f'{source}: options.path "{name}" is a folder; it must be a file, or a'
      f" pattern such as {name.rstrip('/')}/*"
    )
  if path.exists():
    check_uncompressed(name)
    return [path]
  found = sorted(glob.glob(str(path)))
  if found:
    for file in found:
      check_uncompressed(file)
    return [pathlib.Path(file) for file in found]
  raise UserError(
    f'{source}: there is no file "{name}" (split "{split}").{_near(path)}'
  )


def _near(path: pathlib.Path) -> str:
  """Returns a sentence with similar names, or with the folder's content."""
  folder = path.parent
  if not folder.is_dir():
    return f' There is no folder "{folder}" either.'
  names = sorted(file.name for file in folder.iterdir() if file.is_file())
  near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
  if near:
    return " Did you mean " + " or ".join(f'"{name}"' for name in near) + "?"
  shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
  return f' The folder "{folder}" has {shown or "no files"}.'
