"""The folder of a conversion: its state, and whether it can be resumed."""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
from collections.abc import Iterator
from concurrent import futures
from typing import Any

from narvl_jax.data.shards import records
from narvl_jax.data.shards.formats import FORMATS
from narvl_jax.data.shards.manifest import (
  Manifest,
  Shard,
  read_manifest,
  sha256_of,
  verify,
)
from narvl_jax.data.shards.writer import PROGRESS, Job
from narvl_jax.data.sources import MANIFEST
from narvl_jax.data.sources.content import CONTENT_MARK
from narvl_jax.errors import UserError, list_few
from narvl_jax.files import leftovers, side_files
from narvl_jax.files.disk import write_json
from narvl_jax.files.stores import is_remote


def settings_of(job: Job, origin: dict[str, Any]) -> dict[str, Any]:
  """Returns the settings that must not change when a conversion resumes."""
  settings = {
    "schema_version": records.SCHEMA_VERSION,
    "name": job.name,
    "task": job.task,
    **origin,
    "image": job.image(),
    "shards": job.num_shards,
  }
  return json.loads(json.dumps(settings))


def finished_manifest(
  folder: pathlib.Path, job: Job, origin: dict[str, Any]
) -> Manifest | None:
  """Returns the manifest of a complete folder; None if it is incomplete.

  Raises:
    UserError: the folder contains other shards, or is damaged.
  """
  if (folder / MANIFEST).exists():
    manifest = read_manifest(folder)
    had = {**dataclasses.asdict(manifest), "shards": len(manifest.shards)}
    check_settings(folder, had, settings_of(job, origin))
    faults = verify(folder)
    if faults:
      raise UserError(
        f'"{folder}" was complete and is damaged: {list_few(faults, 1)}; set'
        " --to to a new folder, or remove the old one"
      )
    return manifest
  suffix = FORMATS[job.format].suffix
  if not (folder / PROGRESS).exists() and any(folder.glob("*" + suffix)):
    raise UserError(
      f'"{folder}" has files *{suffix} of unknown origin; set --to to another'
      " folder, or remove them"
    )
  return None


def check_settings(
  folder: pathlib.Path, had: dict[str, Any], wanted: dict[str, Any]
) -> None:
  """Raises `UserError` naming the differences, if there are any."""
  for key, value in wanted.items():
    old = had.get(key)
    if key == "source":
      value = _as_comparable(old, value)
    found = list(_differences(key, old, value))
    if not found:
      continue
    path, old, new = found[0]
    if path == "source.fingerprint":
      raise UserError(
        f'the source changed since "{folder}" was begun; set --to to a new'
        " folder, or remove the old one"
      )
    begun = f"with {path}={old!r}" if old is not None else f"without {path}"
    now = repr(new) if new is not None else "none"
    more = ", ".join(path for path, *_ in found[1:])
    raise UserError(
      f'"{folder}" was begun {begun}, this command has {now}'
      + (f" (other differences: {more})" if more else "")
      + "; set --to to a new folder, or remove the old one"
    )


def _as_comparable(old: Any, wanted: dict[str, Any]) -> dict[str, Any]:
  """Removes the digest of contents if `old`, of an older version, has none."""
  fingerprint = str(wanted.get("fingerprint", ""))
  if not isinstance(old, dict) or CONTENT_MARK in str(old.get("fingerprint")):
    return wanted
  return {**wanted, "fingerprint": fingerprint.split(CONTENT_MARK)[0]}


def _differences(
  key: str, old: Any, new: Any
) -> Iterator[tuple[str, Any, Any]]:
  """Yields (path, old, new) of all keys whose values differ."""
  if old == new:
    return
  if not isinstance(new, dict) and not isinstance(old, dict):
    yield key, old, new
    return
  # One of them may lack the section.
  before = old if isinstance(old, dict) else {}
  after = new if isinstance(new, dict) else {}
  for part in {**after, **before}:
    yield from _differences(f"{key}.{part}", before.get(part), after.get(part))


@contextlib.contextmanager
def progress_folder(
  folder: pathlib.Path, job: Job, origin: dict[str, Any]
) -> Iterator[pathlib.Path]:
  """Locks the folder, checks the settings and removes partial files."""
  progress = folder / PROGRESS
  progress.mkdir(parents=True, exist_ok=True)
  with _alone(folder, progress):
    path = progress / "settings.json"
    settings = settings_of(job, origin)
    stored = side_files.read_object(path)
    if stored is None:
      # The settings of the existing shards are unknown.
      for note in progress.glob("[0-9]*.json"):
        note.unlink()
      write_json(path, settings, inside=progress)
    else:
      check_settings(folder, stored, settings)
    # Of earlier versions.
    for file in progress.glob("*.tmp"):
      file.unlink(missing_ok=True)
    yield progress


@contextlib.contextmanager
def _alone(folder: pathlib.Path, progress: pathlib.Path) -> Iterator[None]:
  """Raises UserError if another process converts to the folder.

  Two processes that write to a store write the same objects.
  """
  if is_remote(folder):
    yield
    return
  with open(progress / "lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise UserError(
        f'another conversion is writing to "{folder}"; wait for it, or set --to'
        " to another folder"
      ) from e
    yield


@contextlib.contextmanager
def nothing_left_over(
  progress: pathlib.Path, job: Job, *, shared: bool
) -> Iterator[None]:
  """Empties the folder if the body fails before a shard is complete.

  Otherwise a command with corrected settings would be rejected. Everything
  stays if other hosts write to the folder (`shared`).
  """
  try:
    yield
  except BaseException:
    if not shared and not any(progress.glob("[0-9]*.json")):
      folder = progress.parent
      suffix = FORMATS[job.format].suffix
      for pattern in (f"*{suffix}", f".*{suffix}.*.tmp"):
        for file in folder.glob(pattern):
          file.unlink(missing_ok=True)
      leftovers.remove(progress)
      with contextlib.suppress(OSError):
        folder.rmdir()
    raise


def kept_notes(
  progress: pathlib.Path, folder: pathlib.Path, job: Job, num_threads: int
) -> dict[int, dict[str, Any]]:
  """Returns the notes of the shards that are intact."""

  def check(number: int) -> dict[str, Any] | None:
    try:
      note = json.loads((progress / f"{number:05d}.json").read_text("utf-8"))
      shard = Shard(**note["shard"])
      path = folder / shard.file
      same = path.stat().st_size == shard.bytes
      # A store keeps its own checksums.
      same = same and (is_remote(path) or sha256_of(path) == shard.sha256)
      return note if same else None
    except (OSError, ValueError, KeyError, TypeError):
      return None  # Missing or damaged: the shard is written again.

  with futures.ThreadPoolExecutor(num_threads) as pool:
    notes = list(pool.map(check, range(job.num_shards)))
  return {k: note for k, note in enumerate(notes) if note is not None}
