"""The option `path` of sources: the files of a split."""

import difflib
import glob
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.files.schemes import StoreError
from narvl_jax.files.stores import (
  bucket_of,
  check_address,
  is_remote,
  with_home,
)

# Suffix -> place and content of a mark in such files, command that unpacks.
_COMPRESSED = {
  ".gz": (0, b"\x1f\x8b", "gunzip -k"),
  ".bz2": (4, b"1AY&SY", "bunzip2 -k"),
  ".xz": (0, b"\xfd7zXZ\0", "unxz -k"),
  ".zst": (0, b"\x28\xb5\x2f\xfd", "unzstd"),
  ".zip": (0, b"PK\x03\x04", "unzip"),
}
START_BYTES = 10
# Names of a folder among which a similar one is sought.
_MOST_NAMES = 10_000
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


def check_uncompressed(name: str) -> None:
  """Raises `UserError` for the name of a compressed file."""
  path = pathlib.PurePath(name)
  if path.suffix in _COMPRESSED:
    *_, command = _COMPRESSED[path.suffix]
    raise UserError(
      f'"{name}" is compressed; records are read in any order, so unpack it'
      f" first: {command} {name}, and give {name.removesuffix(path.suffix)}"
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
  try:
    check_address(f"{source}: options.path ", name)
    path = with_home(name)
    if path.is_dir():
      raise UserError(
        f'{source}: options.path "{name}" is a folder; it must be a file, or a'
        f" pattern such as {name.rstrip('/')}/*"
      )
    if path.exists():
      check_uncompressed(name)
      return [path]
    found = _matching(path)
    for file in found:
      check_uncompressed(str(file))
    if found:
      return found
    raise UserError(
      f'{source}: there is no file "{name}" (split "{split}").{_near(path)}'
    )
  except StoreError as error:
    raise UserError(
      f'{source}: options.path "{name}": {error.strerror}'
    ) from error


def _matching(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that a pattern matches, sorted by name."""
  if not is_remote(path):
    return [pathlib.Path(file) for file in sorted(glob.glob(str(path)))]
  base = path
  while glob.has_magic(str(base)):
    base = base.parent
  return sorted(base.glob(path.relative_to(base).as_posix()))


def _near(path: pathlib.Path) -> str:
  """Returns a sentence with similar names, or with the folder's content."""
  folder = path.parent
  if not folder.is_dir():
    if is_remote(folder) and not bucket_of(folder).is_dir():
      return f' There is no bucket "{bucket_of(folder)}".'
    return f' There is no folder "{folder}" either.'
  names = sorted(
    file.name
    for file in itertools.islice(folder.iterdir(), _MOST_NAMES)
    if is_remote(file) or file.is_file()
  )
  near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
  if near:
    return " Did you mean " + " or ".join(f'"{name}"' for name in near) + "?"
  shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
  return f' The folder "{folder}" has {shown or "no files"}.'
