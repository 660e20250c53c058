"""Converts any source to a folder of shards; parallel and resumable.

Shard k of n begins with record k * count // n, so its bytes do not depend on
the number of processes. A shard is written to a temporary file, read back, and
moved to its place; a note in `.convert` marks it as done. The manifest is
written last. A repeated command keeps the shards whose notes and hashes match.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from narvl_jax.data.example import TASKS
from narvl_jax.data.shards import records
from narvl_jax.data.shards.folder import (
  finished_manifest,
  kept_notes,
  nothing_left_over,
  progress_folder,
)
from narvl_jax.data.shards.manifest import Manifest, Shard
from narvl_jax.data.shards.writer import (
  PROGRESS,
  BadAccount,
  Job,
  write_all,
  write_error,
)
from narvl_jax.data.sources import open_source
from narvl_jax.errors import UserError, check_fractions, did_you_mean
from narvl_jax.files import leftovers
from narvl_jax.files.disk import write_json
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.activity import Activity
from narvl_jax.terminal.progress import doing
from narvl_jax.terminal.text import show

_ORIENTATION_NOTES = {
  "ignore": (
    "they were stored without rotation; --exif_orientation=apply turns them"
    " upright"
  ),
  "apply": "they were turned upright",
}

# (job, numbers of shards, progress) -> (number, note) of each shard; see
# `write_all`.
Write = Callable[
  [Job, Sequence[int], Activity], Iterator[tuple[int, dict[str, Any]]]
]


def plan(
  spec: str,
  folder: str,
  *,
  task: str = "",
  split: str = "",
  options: dict[str, Any] | None = None,
  name: str = "",
  limit: int = 0,
  shards: int = 0,
  shard_size: int = 2000,
  image_size: int = 0,
  quality: int = 95,
  format: str = "array_record",
  exif_orientation: str = "ignore",
  size_flags: str = "--shards, --shard_size or --max_examples",
) -> tuple[Job, dict[str, Any]]:
  """Opens the source once; returns the job and the identity of its input.

  Args not listed here are those of `Job`.

  Args:
    task: one of `TASKS`; may be "" if the source knows its task.
    name: name of the shards; by default TASK-SPLIT.
    limit: largest number of records to convert; 0 converts all.
    shards: number of shards; 0 derives it from `shard_size`.
    shard_size: approximate number of records of a shard.
    size_flags: flags to name in the error about too many shards.

  Raises:
    UserError: the source cannot be opened or has no record.
  """
  options = options or {}
  source: Any = open_source(
    spec, task=task, split=split, exif_orientation=exif_orientation, **options
  )
  if getattr(source, "upright", False):
    # An earlier conversion turned the pictures already.
    exif_orientation = "apply"
  task = task or getattr(source, "task", "")
  if task not in TASKS:
    raise UserError(f'--task is "{task}".{did_you_mean(task, TASKS)}')
  found_split = split or getattr(source, "split", "") or "train"
  count = min(limit, len(source)) if limit else len(source)
  if count < 1:
    raise UserError(f'"{spec}" has no record; check --split')
  num_shards = shards or math.ceil(count / shard_size)
  most = min(count, 99999)
  if num_shards > most:
    raise UserError(
      f"{num_shards} shards for {count} records are too many; there may be"
      f" {most}: change {size_flags}"
    )
  kept = [c if c.isalnum() or c in "-_." else "_" for c in found_split]
  job = Job(
    spec, task, split, options, folder, name or f"{task}-{''.join(kept)}",
    count, num_shards, image_size, quality, format, exif_orientation,
  )  # fmt: skip
  origin = {
    "spec": spec,
    "options": options,
    "records": count,
    # "" for records that are in no file.
    "fingerprint": getattr(source, "fingerprint", str)(),
  }
  return job, {"split": found_split, "source": origin}


def convert(
  job: Job,
  origin: dict[str, Any],
  *,
  num_workers: int = 0,
  max_bad_fraction: float = 0.01,
  log: Callable[[str], None] = show,
  write: Write | None = None,
) -> Manifest:
  """Writes the missing shards of a `plan`, and the manifest.

  Args:
    num_workers: number of processes; 0 works in this one.
    max_bad_fraction: share of the records that may be bad and left out.
    write: writes shards instead of `write_all`.

  Raises:
    UserError: `max_bad_fraction` is not in [0, 1], too many records are bad,
      the folder contains something else or is in use by another conversion, or
      it cannot be written.
  """
  check_fractions(max_bad_fraction=max_bad_fraction)
  folder = as_path(job.folder)
  done = finished_manifest(folder, job, origin)
  if done is not None:
    log(f"{folder} is complete: {done.records} records")
    return done
  with (
    _written(folder),
    progress_folder(folder, job, origin) as progress,
    nothing_left_over(progress, job, shared=write is not None),
  ):
    notes = kept_notes(progress, folder, job, max(num_workers, 1))
    if notes:
      log(f"{len(notes)} of {job.num_shards} shards are there already")
    account = BadAccount(job, max_bad_fraction)
    for note in notes.values():
      account.add(note, log=False)
    write = write or (lambda job, todo, _: write_all(job, todo, num_workers))
    # Closed at once: after a failure no process may continue to write.
    with contextlib.closing(_missing(job, notes, write)) as missing:
      for number, note in missing:
        account.add(note)
        write_json(progress / f"{number:05d}.json", note, inside=progress)
        notes[number] = note
        shard = note["shard"]
        log(
          f"{shard['file']}: {shard['records']} records,"
          f" {shard['bytes'] / 1e6:.1f} MB, {len(note['bad'])} bad"
        )
    manifest = _manifest(job, origin, [notes[k] for k in sorted(notes)])
    manifest.write(folder)
  turned = sum(note.get("turned", 0) for note in notes.values())
  if turned:
    log(
      f"{turned} pictures have an EXIF orientation, which --image_size removes:"
      f" {_ORIENTATION_NOTES[job.exif_orientation]}"
    )
  leftovers.remove(folder / PROGRESS)
  return manifest


def _missing(
  job: Job, notes: Mapping[int, dict[str, Any]], write: Write
) -> Generator[tuple[int, dict[str, Any]], None, None]:
  """Writes the shards without a note and yields (number, note) of each."""
  todo = [k for k in range(job.num_shards) if k not in notes]
  sizes = {number: len(job.indices(number)) for number in todo}
  text, finished = f"writing {job.name}", 0
  with doing(text, sum(sizes.values()), "records") as writing:
    for number, note in write(job, todo, writing):
      yield number, note
      finished += sizes[number]
      writing.done = finished


def _manifest(
  job: Job, origin: dict[str, Any], notes: Sequence[dict[str, Any]]
) -> Manifest:
  shards = [Shard(**note["shard"]) for note in notes]
  counts = [note["labels"] for note in notes if "labels" in note]
  return Manifest(
    schema_version=records.SCHEMA_VERSION,
    name=job.name,
    task=job.task,
    split=origin["split"],
    source=origin["source"],
    image=job.image(),
    records=sum(shard.records for shard in shards),
    bad_records=[bad for note in notes for bad in note["bad"]],
    shards=shards,
    labels={k: sum(count[k] for count in counts) for k in counts[0]}
    if counts
    else None,
  )


@contextlib.contextmanager
def _written(folder: pathlib.Path) -> Iterator[None]:
  """Turns errors of writing to the target into a `UserError`."""
  try:
    yield
  except BrokenPipeError:
    # It concerns stdout.
    raise
  except OSError as e:
    raise write_error(folder, e) from e
