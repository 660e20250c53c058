"""Paths of users: local ones, and those in object stores (gs://, s3://)."""

import importlib.util
import os
import pathlib
import posixpath
import re
from typing import cast

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.files.schemes import PACKAGES

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is in an object store."""
  return str(path).startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def as_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path that a user named.

  Returns:
    A `pathlib.Path`, or, in a store, a `StorePath`, which has its methods.

  Raises:
    UserError: the store is unknown, or its package is not installed.
  """
  if isinstance(path, pathlib.Path):
    # `pathlib.Path("gs://b")` is "gs:/b", a local folder.
    assert path.parts[:1] not in (("gs:",), ("s3:",)), path
    return path
  text = os.fspath(path)
  if is_remote(text):
    check_address("", text)
    # Imports fsspec, which local paths do not need.
    from narvl_jax.files.store_path import StorePath

    return cast(pathlib.Path, StorePath(text))
  check_address("", text)
  return pathlib.Path(text)


def bucket_of(path: pathlib.Path) -> pathlib.Path:
  """Returns the bucket of a path in a store."""
  scheme, _, place = str(path).partition("://")
  return as_path(f"{scheme}://{place.partition('/')[0]}")


def with_home(name: str) -> pathlib.Path:
  """Returns a path as `as_path` does; "~" and "~/..." start at the home folder.

  "~someone" is an ordinary name, because that home depends on the machine.
  """
  at_home = name == "~" or name.startswith("~/")
  return as_path(os.path.expanduser(name) if at_home else name)


def beside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the path that a file in `folder` names; see `with_home`."""
  path = with_home(name)
  if is_remote(path) or path.is_absolute():
    return path
  if not is_remote(folder):
    return folder / path
  # A store does not know "..".
  scheme, _, place = str(folder).partition("://")
  return as_path(f"{scheme}://{posixpath.normpath(f'{place}/{name}')}")


def cache_folder() -> pathlib.Path:
  """Returns the folder of this user's cached files."""
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return with_home(cache) / "narvl_jax"


def check_address(flag: str, text: str) -> None:
  """Checks that a path is local, or in a store that can be read.

  Args:
    flag: name of the flag and "=", for messages.

  Raises:
    UserError: the store is unknown, no bucket is named, or the package that
      reads it is not installed.
  """
  for scheme in PACKAGES:
    if re.match(rf"{scheme}:/?(?!/)", text):
      raise UserError(
        f'{flag}"{text}" is not a path in a bucket; write'
        f" {scheme}://{text[len(scheme) + 1 :].lstrip('/')}"
      )
  match = _SCHEME.match(text)
  if match is None:
    return
  scheme = match.group(1)
  if scheme not in PACKAGES:
    schemes = [f"{x}://" for x in PACKAGES]
    raise UserError(
      f'{flag}"{text}": {scheme}:// cannot be read.'
      f"{did_you_mean(f'{scheme}://', schemes)} Valid are local paths and"
      f" {' and '.join(schemes)}"
    )
  if not text[match.end() :].strip("/"):
    raise UserError(
      f'{flag}"{text}" names no bucket; give {scheme}://BUCKET/FOLDER'
    )
  package, extra = PACKAGES[scheme]
  if importlib.util.find_spec(package) is None:
    raise UserError(
      f'{flag}"{text}": {scheme}:// needs the package {package}; install it:'
      f' pip install "narvl_jax[{extra}]" or pip install {package}'
    )
