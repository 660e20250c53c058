"""`manifest.json`: contents of a folder of shards, and their verification."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from concurrent import futures
from typing import Any

from narvl_jax.data.shards.formats import format_of
from narvl_jax.data.shards.records import SCHEMA_VERSION
from narvl_jax.data.sources import MANIFEST
from narvl_jax.errors import UserError
from narvl_jax.files.disk import write_json
from narvl_jax.files.regular import sha256_of as sha256_of
from narvl_jax.files.stores import is_remote

_STORE_THREADS = 32
_AGAIN = "; convert the data again with python -m narvl_jax.convert_data"


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file: name within the folder, records, bytes, SHA-256 in hexadecimal."""

  file: str
  records: int
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The content of `manifest.json`.

  Attributes:
    schema_version: schema version of the records; see `records`.
    name: the shards are NAME-00000-of-00012.array_record.
    source: what was converted: spec, options, fingerprint, length; of
      distilled data also teacher, checkpoint_step, vocabulary (its
      fingerprint), decoding and format.
    image: how pictures are stored: {"encoding": "original"}, or "jpeg" with
      size and quality.
    bad_records: index, place, id and reason of each record that was left out.
    labels: sums over the records of distilled data; see
      `distilled.Labelled.counts`.
  """

  schema_version: int
  name: str
  task: str
  split: str
  source: dict[str, Any]
  image: dict[str, Any]
  records: int
  bad_records: list[dict[str, Any]]
  shards: list[Shard]
  labels: dict[str, float] | None = None

  def write(self, folder: pathlib.Path) -> None:
    """Writes the manifest atomically."""
    fields = dataclasses.asdict(self)
    if self.labels is None:
      del fields["labels"]
    write_json(folder / MANIFEST, fields, inside=folder)


def read_manifest(folder: pathlib.Path) -> Manifest:
  """Reads the manifest of a folder.

  Raises:
    UserError: there is none, it is damaged, or its version is newer.
  """
  path = folder / MANIFEST
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
    version = int(fields["schema_version"])
  except FileNotFoundError as e:
    raise UserError(
      f'"{folder}" has no {MANIFEST}; pass a folder that'
      " narvl_jax.convert_data has completed"
    ) from e
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f'"{path}" is not a manifest ({e!r}){_AGAIN}') from e
  if version > SCHEMA_VERSION:
    raise UserError(
      f'"{path}" has schema version {version}; this version of narvl_jax reads'
      f" versions up to {SCHEMA_VERSION}: upgrade narvl_jax, or convert the"
      " data with this version"
    )
  try:
    fields["shards"] = [Shard(**shard) for shard in fields["shards"]]
    manifest = Manifest(**fields)
    total = sum(shard.records for shard in manifest.shards)
  except (TypeError, KeyError) as e:
    raise UserError(f'"{path}" is not a manifest ({e}){_AGAIN}') from e
  if manifest.records != total:
    raise UserError(
      f'"{path}" counts {manifest.records} records and {total} in its'
      f" shards{_AGAIN}"
    )
  return manifest


def quick_faults(folder: pathlib.Path, manifest: Manifest) -> list[str]:
  """Returns the faults of shards that are found without reading their data."""
  # A store answers many requests at once.
  threads = _STORE_THREADS if is_remote(folder) else 1
  with futures.ThreadPoolExecutor(threads) as pool:
    found = pool.map(lambda x: _quick_fault(folder, x), manifest.shards)
    return [fault for fault in found if fault]


def _quick_fault(folder: pathlib.Path, shard: Shard) -> str:
  path = folder / shard.file
  try:
    size = path.stat().st_size
  except OSError as e:
    return f"{shard.file}: {'missing' if not path.exists() else e.strerror}"
  if size != shard.bytes:
    word = "truncated" if size < shard.bytes else "too long"
    return f"{shard.file}: {word}: {size:,} bytes of {shard.bytes:,}"
  if is_remote(folder):
    # Records are counted in local files only.
    return ""
  try:
    count = format_of(path).count(path)
  except Exception as e:  # Damage raises various errors in the library.
    return f"{shard.file}: cannot be read: {e}"
  if count != shard.records:
    return f"{shard.file}: damaged: {count} records of {shard.records}"
  return ""


def verify(folder: pathlib.Path, *, num_threads: int = 1) -> list[str]:
  """Reads all shards of a folder and returns a line for each fault.

  Finds shards that are missing, renamed, truncated or changed in any bit, and
  files that the manifest does not list.

  Raises:
    UserError: the manifest itself cannot be used.
  """
  manifest = read_manifest(folder)
  listed = {shard.file for shard in manifest.shards}
  suffixes = {format_of(shard.file).suffix for shard in manifest.shards}
  strays = sorted(
    path
    for suffix in suffixes
    for path in folder.glob("*" + suffix)
    if path.name not in listed
  )
  with futures.ThreadPoolExecutor(max(num_threads, 1)) as pool:
    faults = list(
      pool.map(lambda shard: _fault(folder, shard), manifest.shards)
    )
    stray_hashes = dict(zip(strays, pool.map(sha256_of, strays), strict=True))
  return list(_fault_lines(manifest, faults, stray_hashes))


def _fault(folder: pathlib.Path, shard: Shard) -> str:
  fault = _quick_fault(folder, shard)
  if fault:
    return fault
  if sha256_of(folder / shard.file) != shard.sha256:
    return f"{shard.file}: changed: its SHA-256 is not the manifest's"
  return ""


def _fault_lines(
  manifest: Manifest, faults: list[str], strays: dict[pathlib.Path, str]
) -> Iterator[str]:
  """Yields the faults; a stray file may contain the data of a missing shard."""
  known = {shard.sha256: shard.file for shard in manifest.shards}
  for shard, fault in zip(manifest.shards, faults, strict=True):
    if not fault:
      continue
    copies = [p.name for p, value in strays.items() if value == shard.sha256]
    hint = f"; {copies[0]} has its data, rename it" if copies else ""
    yield fault + hint
  for path, value in strays.items():
    twin = f", a copy of {known[value]}" if value in known else ""
    yield f"{path.name}: not in {MANIFEST}{twin}"
