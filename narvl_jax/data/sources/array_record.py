"""Folders of ArrayRecord shards that `narvl_jax.convert_data` wrote."""

import dataclasses
import hashlib
import itertools
import pathlib
import threading
from typing import Any

from array_record.python import array_record_data_source

from narvl_jax.data.example import Record
from narvl_jax.data.pictures.files import with_orientation
from narvl_jax.data.shards import records
from narvl_jax.data.shards.formats import FORMATS
from narvl_jax.data.shards.manifest import (
  Manifest,
  Shard,
  quick_faults,
  read_manifest,
)
from narvl_jax.data.sources import MANIFEST, files
from narvl_jax.data.sources.base import RecordSource, find_part
from narvl_jax.errors import UserError, list_few
from narvl_jax.files import store_cache
from narvl_jax.files.store_cache import local_copy
from narvl_jax.files.stores import is_remote, with_home

_SUFFIX = FORMATS["array_record"].suffix


class ArrayRecordSource(RecordSource):
  """Records of one or several folders of shards.

  Only the indices of the shards are kept in memory.

  Attributes:
    upright: pictures were converted with `--exif_orientation=apply`; they are
      turned upright with any setting of the run.
  """

  def __init__(
    self, *, task: str, split: str, path: files.PathOption = None
  ) -> None:
    """Compares sizes and counts of the shards with the manifest.

    Args:
      task: task of the manifest; "" accepts any.
      split: split of the manifest; "" accepts any.
      path: folders instead of files; see `files.resolve`.

    Raises:
      UserError: there is no such folder, a shard is missing or damaged, or
        the folder contains another task or split.
    """
    manifests = files.resolve(
      _manifest_names(path), split, source="array_record"
    )
    self._folders = [file.parent for file in manifests]
    shards: list[tuple[pathlib.Path, Shard]] = []
    settings: set[str] = set()
    for folder in self._folders:
      manifest = read_manifest(folder)
      task = task or manifest.task
      split = split or manifest.split
      _check_contents(folder, manifest, task, split)
      shards += [(folder, shard) for shard in manifest.shards]
      settings.add(manifest.image.get("exif_orientation", "ignore"))
    if len(settings) > 1:
      raise UserError(
        "array_record: some of the folders "
        + ", ".join(f'"{folder}"' for folder in self._folders)
        + " were converted with --exif_orientation=apply and some without; read"
        " them by entries of their own, or convert them alike"
      )
    self.upright = settings == {"apply"}
    self.task, self.split = task, split
    self._names = [str(folder / shard.file) for folder, shard in shards]
    self._fingerprint = [shard.sha256 for _, shard in shards]
    self._ends = list(itertools.accumulate(s.records for _, s in shards))
    self._shards = [_OpenedShard(*part) for part in shards]
    _check_cache(shards)

  def __len__(self) -> int:
    return self._ends[-1]

  def _read(self, number: int) -> Record:
    shard, place = find_part(self._ends, number)
    try:
      data = self._shards[shard].read(place)
    except RuntimeError as e:  # Damaged data.
      raise UserError(
        f"the stored record cannot be read ({e}); check the folder with"
        " python -m narvl_jax.convert_data DIR --verify"
      ) from e
    record = records.deserialize(data)
    if not self.upright:
      return record
    image = with_orientation(record.image, "apply")
    return dataclasses.replace(record, image=image)

  def _place(self, number: int) -> str:
    """Returns "SHARD record N", counted from 0."""
    shard, record = find_part(self._ends, number)
    return f"{self._names[shard]} record {record}"

  def fingerprint(self) -> str:
    """Returns a hash of the shards' checksums."""
    return hashlib.sha256("".join(self._fingerprint).encode()).hexdigest()


class _OpenedShard:
  """A shard that is opened when it is first read.

  The library reads local files, so a shard in a store is copied first.
  """

  def __init__(self, folder: pathlib.Path, shard: Shard) -> None:
    self._path, self._records = folder / shard.file, shard.records
    self._data: Any = None
    self._lock = threading.Lock()

  def read(self, number: int) -> bytes:
    if self._data is None:
      with self._lock:
        if self._data is None:
          # Opens the copy at once, which may be removed later.
          data = self._open()
          found = data[number]
          self._data = data
          return found
    return self._data[number]

  def _open(self) -> Any:
    name = str(local_copy(self._path))
    whole: Any = [_Instruction(name, 0, self._records, self._records)]
    return array_record_data_source.ArrayRecordDataSource(whole)

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_data": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """A whole shard in the library's form, which avoids opening it."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


def _check_cache(shards: list[tuple[pathlib.Path, Shard]]) -> None:
  """Raises UserError if the cache is too small for the shards in a store."""
  remote = [(folder, x.bytes) for folder, x in shards if is_remote(folder)]
  if remote:
    store_cache.check_room(
      f'array_record: the shards of "{remote[0][0]}"',
      sum(size for _, size in remote),
    )


def _manifest_names(path: Any) -> Any:
  """Returns `path` with the manifest of each folder instead of the folder."""
  if isinstance(path, str):
    return path if path.endswith(MANIFEST) else str(with_home(path) / MANIFEST)
  if path is not None and hasattr(path, "items"):
    return {key: _manifest_names(value) for key, value in path.items()}
  if isinstance(path, (tuple, list)):
    return tuple(_manifest_names(name) for name in path)
  return path


def _check_contents(
  folder: pathlib.Path, manifest: Manifest, task: str, split: str
) -> None:
  for name, value, found in (
    ("task", task, manifest.task),
    ("split", split, manifest.split),
  ):
    if value != found:
      raise UserError(
        f'array_record: "{folder}" contains the {name} "{found}", not'
        f' "{value}"; set {name}="{found}" or another options.path'
      )
  other = [s.file for s in manifest.shards if not s.file.endswith(_SUFFIX)]
  if other:
    raise UserError(
      f'array_record: "{folder}" contains other files, such as {other[0]}; read'
      f' them with the source ofa_tsv and path="{folder}/*.tsv"'
    )
  faults = quick_faults(folder, manifest)
  if faults:
    raise UserError(
      f'array_record: the folder "{folder}" is damaged: {list_few(faults, 1)};'
      f" see python -m narvl_jax.convert_data {folder} --verify"
    )
  if not manifest.records:
    raise UserError(f'array_record: "{folder}" has no record')
