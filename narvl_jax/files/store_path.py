"""Files in object stores, with the methods of `pathlib.Path`."""

# The methods do what those of `pathlib.Path` do.
# ruff: noqa: D102

import contextlib
import datetime
import fnmatch
import io
import logging
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import fsspec
import fsspec.config
from etils.epath.gpath import PosixGPath

from narvl_jax.files import s3
from narvl_jax.files.schemes import COMMIT_FILE, PACKAGES
from narvl_jax.files.store_errors import explained, missing

_BLOCK_BYTES = 16 << 20

for _scheme in PACKAGES:
  # Another process may have changed what was listed.
  _settings = fsspec.config.conf.setdefault(_scheme, {})
  _settings.setdefault("use_listings_cache", False)
# They log errors which they raise as well.
for _name in ("gcsfs", "s3fs", "google.auth._default"):
  logging.getLogger(_name).setLevel(logging.CRITICAL)


class Stored(NamedTuple):
  """An object, and what changes with each write of it."""

  data: bytes
  version: str


class State(NamedTuple):
  """What changes with each write of a file: bytes; generation or ETag."""

  size: int
  version: str


class StorePath(PosixGPath):
  """A file or folder in a store; a folder is what names have in common.

  Objects are written at once, so readers see the old or the new one. There are
  no links, no appending and no renaming (`rename` copies). Unlike etils', its
  errors are `OSError`, and `exists` does not return False if the store fails.
  """

  @property
  def scheme(self) -> str:
    """The store: "gs" or "s3"."""
    return str(self).partition("://")[0]

  @property
  def key(self) -> tuple[str, str]:
    """The bucket, and the name in it."""
    bucket, _, name = str(self).partition("://")[2].partition("/")
    return bucket, name

  @property
  def system(self) -> Any:
    """The file system of fsspec, one per process and store."""
    return fsspec.filesystem(self.scheme)

  def _info(self) -> dict[str, Any] | None:
    with explained(self):
      try:
        return self.system.info(str(self))
      except FileNotFoundError:
        return None

  def exists(self) -> bool:
    return self._info() is not None

  def is_dir(self) -> bool:
    info = self._info()
    return info is not None and info["type"] == "directory"

  def is_file(self) -> bool:
    info = self._info()
    return info is not None and info["type"] == "file"

  def is_symlink(self) -> bool:
    return False

  def resolve(self, strict: bool = False) -> Self:
    del strict
    return self

  absolute = expanduser = resolve

  def stat(self, *, follow_symlinks: bool = True) -> Any:
    del follow_symlinks
    info = self._info()
    if info is None:
      raise missing(self)
    folder = info["type"] == "directory"
    kind = stat.S_IFDIR if folder else stat.S_IFREG
    size = int(info.get("size") or 0)
    changed = _changed(info)
    return os.stat_result((kind | 0o644, 0, 0, 1, 0, 0, size, 0, changed, 0))

  lstat = stat

  def iterdir(self) -> Iterator[Self]:
    with explained(self):
      names = self.system.ls(str(self), detail=False)
    for name in names:
      if name.rstrip("/") != "/".join(self.key):
        yield self._new(f"{self.scheme}://{name}")

  def glob(self, pattern: str) -> Iterator[Self]:
    first, _, rest = pattern.partition("/")
    with contextlib.suppress(FileNotFoundError):
      for path in self.iterdir():
        if fnmatch.fnmatchcase(path.name, first):
          yield from path.glob(rest) if rest else (path,)

  def rglob(self, pattern: str) -> Iterator[Self]:
    for path in self.files():
      if fnmatch.fnmatchcase(path.name, pattern):
        yield path

  def files(self) -> list[Self]:
    """Returns the files below this folder; none if it does not exist."""
    with explained(self):
      names = self.system.find(str(self))
    return [self._new(f"{self.scheme}://{name}") for name in names]

  def size_and_time(self) -> tuple[int, float]:
    """See `disk.size_and_time`."""
    with explained(self):
      found = self.system.find(str(self), detail=True).values()
    if not found:
      raise missing(self)
    return sum(int(x["size"] or 0) for x in found), max(map(_changed, found))

  def open(self, mode: str = "r", **options: Any) -> Any:
    """Opens the file; writes are visible only after `close`."""
    with explained(self):
      if "r" not in mode:
        return super().open(mode, **options)
      raw = _Raw(self, self.system.open(str(self), "rb", _BLOCK_BYTES))
    file = io.BufferedReader(raw, _BLOCK_BYTES)
    return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

  def read_bytes(self) -> bytes:
    with explained(self):
      return self.system.cat_file(str(self))

  def read_text(
    self, encoding: str | None = None, errors: str | None = None
  ) -> str:
    return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

  def write_bytes(self, data: bytes) -> int:
    with explained(self):
      self.system.pipe_file(str(self), bytes(data))
    return len(data)

  def write_text(self, data: str, *_: Any, **__: Any) -> int:
    return self.write_bytes(data.encode())

  def put(self, local: pathlib.Path) -> None:
    """Writes the contents of a local file, or of the files of a folder."""
    files = [x for x in local.rglob("*") if x.is_file()]
    for file in files if local.is_dir() else [local]:
      target = self / file.relative_to(local)
      with explained(target):
        self.system.put_file(str(file), str(target))

  def get(self, local: pathlib.Path) -> None:
    """Reads the file into a local one."""
    with explained(self):
      self.system.get_file(str(self), str(local))

  def mkdir(self, *_: Any, **__: Any) -> None:
    """Does nothing: a store has no folders."""

  rmdir = mkdir

  def unlink(self, missing_ok: bool = False) -> None:
    with explained(self):
      try:
        self.system.rm_file(str(self))
      except FileNotFoundError:
        if not missing_ok:
          raise

  def rmtree(self, missing_ok: bool = False) -> None:
    """Removes a folder; first what makes it a checkpoint."""
    files = self.files()
    if not files and not missing_ok:
      raise missing(self)
    for file in files:
      if file.name == COMMIT_FILE:
        file.unlink(missing_ok=True)
    with explained(self), contextlib.suppress(FileNotFoundError):
      self.system.rm([str(x) for x in files if x.name != COMMIT_FILE])

  def rename(self, target: str | os.PathLike[str]) -> Self:
    """Copies a file or folder, then removes it."""
    new = self._new(os.fspath(target))
    if self.is_file():
      with explained(self):
        self.system.cp_file(str(self), str(new))
      self.unlink()
      return new
    for file in self.files():
      with explained(file):
        self.system.cp_file(str(file), str(new / file.relative_to(self)))
    self.rmtree()
    return new

  replace = rename

  def read_stored(self) -> Stored | None:
    """Returns the object, and the version to `write_if`; None if missing."""
    with contextlib.suppress(FileNotFoundError):
      # Read after its version: then a write in between makes `write_if` fail.
      version = self.state().version
      return Stored(self.read_bytes(), version)
    return None

  def state(self) -> State:
    """Returns what changes with the file; raises `FileNotFoundError`."""
    with explained(self):
      if self.scheme == "gs":
        # Unlike `info`, it does not also look for a folder.
        info = self.system.call("GET", "b/{}/o/{}", *self.key, json_out=True)
        return State(int(info["size"]), str(info["generation"]))
      info = self.system.info(str(self))
      if info["type"] != "file":
        raise missing(self)
      return State(int(info["size"]), info["ETag"])

  def read_range(self, start: int, stop: int, state: State) -> bytes:
    """Returns the bytes [start, stop) of the file.

    Raises:
      FileNotFoundError: the file has another state, or none.
    """
    if stop <= start:
      return b""
    with explained(self):
      if self.scheme == "gs":
        return self.system.cat_file(
          str(self), start=start, end=stop, generation=state.version
        )
      return s3.read_range(self, start, stop, state.version)

  def write_if(self, data: bytes, version: str | None) -> bool:
    """Writes the object unless another process has written it.

    Args:
      version: of the object that is replaced; None: there must be none.

    Returns:
      Whether it was written.
    """
    bucket, name = self.key
    with explained(self):
      try:
        if self.scheme == "gs":
          self.system.call(
            "POST",
            self.system.base.replace("/storage/", "/upload/storage/")
            + "b/{}/o",
            bucket,
            uploadType="media",
            name=name,
            ifGenerationMatch=version or "0",
            data=data,
            headers={"Content-Type": "application/octet-stream"},
          )
        else:
          condition = {"IfNoneMatch": "*"}
          if version is not None:
            condition = {"IfMatch": version}
          self.system.call_s3(
            "put_object", Bucket=bucket, Key=name, Body=data, **condition
          )
        return True
      except FileNotFoundError:
        if version is None:
          raise
      except OSError as error:
        if not _is_condition(error):
          raise
    # A repeated request may fail because the first one was carried out.
    found = self.read_stored()
    return found is not None and found.data == data


class _Raw(io.RawIOBase):
  """A file of fsspec whose errors are `OSError`."""

  def __init__(self, path: StorePath, file: Any) -> None:
    self._path, self._file = path, file

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()

  def readinto(self, buffer: Any) -> int:
    with explained(self._path):
      return self._file.readinto(buffer)

  def close(self) -> None:
    self._file.close()
    super().close()


def _changed(info: dict[str, Any]) -> float:
  """Returns the Unix time of the last change; 0 for a folder."""
  changed = info.get("mtime") or info.get("LastModified") or 0
  if isinstance(changed, datetime.datetime):
    return changed.timestamp()
  return float(changed)


def _is_condition(error: OSError) -> bool:
  """Returns whether a conditional write failed because of its condition."""
  response = getattr(error.__cause__, "response", None) or {}
  code = response.get("Error", {}).get("Code", "")
  return isinstance(error, FileExistsError) or code in (
    *("PreconditionFailed", "ConditionalRequestConflict", "412", "409"),
  )
