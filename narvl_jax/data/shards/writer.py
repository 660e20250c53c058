"""Writes the shards of a conversion in one or several processes."""

import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import io
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent import futures
from typing import Any

from PIL import Image

from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.batches.processes import exit_with_parent
from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images
from narvl_jax.data.shards.formats import FORMATS, ShardFormat
from narvl_jax.data.shards.manifest import Shard, sha256_of
from narvl_jax.data.sources import MANIFEST, open_source
from narvl_jax.errors import UserError
from narvl_jax.files.disk import atomically
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.text import warn

PROGRESS = ".convert"
_MAX_LOGGED = 20
CONTINUE = "; the same command continues"


@dataclasses.dataclass(frozen=True)
class Job:
  """A conversion: everything that a process needs to write a shard.

  Attributes:
    spec: source to convert; see `open_source`.
    split: such as "train"; "" is the source's default.
    name: the shards are NAME-00000-of-00012.array_record.
    image_size: side of square JPEG pictures; 0 keeps the original bytes.
    quality: JPEG quality of these pictures, 1 to 100.
    exif_orientation: "ignore" or "apply"; see `RecordSource`.
  """

  spec: str
  task: str
  split: str
  options: dict[str, Any]
  folder: str
  name: str
  count: int
  num_shards: int
  image_size: int = 0
  quality: int = 95
  format: str = "array_record"
  exif_orientation: str = "ignore"

  def file(self, number: int) -> str:
    """Returns the file name of a shard."""
    suffix = FORMATS[self.format].suffix
    return f"{self.name}-{number:05d}-of-{self.num_shards:05d}{suffix}"

  def indices(self, number: int) -> range:
    """Returns the indices of the source's records in a shard."""
    ends = [k * self.count // self.num_shards for k in (number, number + 1)]
    return range(*ends)

  def open(self) -> Sequence[Record]:
    """Opens the source."""
    return open_source(
      self.spec,
      task=self.task,
      split=self.split,
      exif_orientation=self.exif_orientation,
      **self.options,
    )

  def image(self) -> dict[str, Any]:
    """Returns how pictures are stored, as in `Manifest.image`."""
    stored: dict[str, Any] = {"encoding": "original"}
    if self.image_size:
      stored = {"encoding": "jpeg", "size": self.image_size}
      stored["quality"] = self.quality
    # "ignore" is left out: older manifests do not have the key.
    if self.exif_orientation == "apply":
      stored["exif_orientation"] = "apply"
    return stored


def write_error(path: Any, error: BaseException) -> UserError:
  """Returns the error about a target that cannot be written."""
  reason = getattr(error, "strerror", None) or str(error).split("; ")[0]
  return UserError(
    f'cannot write "{path}": {reason}; make room, or set --to to another'
    f" folder{CONTINUE}"
  )


def write_all(
  job: Job, todo: Sequence[int], num_workers: int
) -> Generator[tuple[int, dict[str, Any]], None, None]:
  """Yields (number, note) of each shard when it is written; see `write_shard`.

  Works in this process if `num_workers` is 0.

  Raises:
    UserError: a shard cannot be written, or a process died.
  """
  if num_workers < 1 or not todo:
    source = job.open() if todo else ()
    for number in todo:
      yield number, write_shard(source, job, number)
    return
  # Forked processes would inherit locks that threads of this one hold.
  pool = futures.ProcessPoolExecutor(
    min(num_workers, len(todo)),
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start_worker,
    initargs=(job, os.getpid()),
  )
  others = multiprocessing.active_children()
  try:
    with _interrupts_ignored():
      numbers = {pool.submit(_write_in_worker, k): k for k in todo}
    for future in futures.as_completed(numbers):
      yield numbers[future], future.result()
  except concurrent.futures.process.BrokenProcessPool as e:
    raise UserError(
      "a process that converts died; out of memory? Lower --num_workers"
      f"{CONTINUE}"
    ) from e
  except (KeyboardInterrupt, GeneratorExit):
    # The caller gave up: do not wait for shards in progress.
    for process in multiprocessing.active_children():
      if process not in others:
        process.terminate()
    raise
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
  """Processes started within never receive Ctrl-C, not even while importing."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


_worker: dict[str, Any] = {}


def _start_worker(job: Job, parent: int) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  _worker["job"] = job
  exit_with_parent(parent)


def _write_in_worker(number: int) -> dict[str, Any]:
  job = _worker["job"]
  if "source" not in _worker:
    _worker["source"] = job.open()
  return write_shard(_worker["source"], job, number)


def write_shard(
  source: Sequence[Record], job: Job, number: int
) -> dict[str, Any]:
  """Writes a shard, reads it back, and moves it to its place.

  Returns:
    "shard": the fields of `Shard`; "bad": index, place, id and reason of each
    record that was left out; "turned": number of pictures that lost an EXIF
    orientation, absent if 0.

  Raises:
    UserError: the shard cannot be written, or differs when it is read back.
  """
  folder = as_path(job.folder)
  file = job.file(number)
  bad: list[dict[str, Any]] = []
  records = RecordReader(source, job.name, job.count, among=job.indices(number))
  try:
    with atomically(folder / file) as temporary:
      count, digest, turned = _write(records, job, number, temporary, bad)
      if _digest(temporary, FORMATS[job.format]) != (count, digest):
        raise OSError("what was read back differs from what was written")
      size = temporary.stat().st_size
      shard = Shard(file, count, size, sha256_of(temporary))
  except (OSError, RuntimeError) as e:  # The library raises RuntimeError.
    if e is records.defect:
      raise
    raise write_error(folder / file, e) from e
  note = {"shard": dataclasses.asdict(shard), "bad": bad}
  return {**note, "turned": turned} if turned else note


def _write(
  records: RecordReader,
  job: Job,
  number: int,
  path: pathlib.Path,
  bad: list[dict[str, Any]],
) -> tuple[int, str, int]:
  """Returns the number of records, their SHA-256, and how many lost a tag."""
  digest = hashlib.sha256()
  count = turned = 0
  shards = FORMATS[job.format]

  def stored(record: Record) -> tuple[bytes, bool]:
    loses_tag = bool(job.image_size) and images.orientation(record.image) != 1
    return shards.serialize(_with_stored_image(record, job)), loses_tag

  with shards.writing(path) as write:
    for index in job.indices(number):
      found = records.read(index, stored)
      if isinstance(found, BadRecord):
        bad.append(
          {
            "index": index,
            "place": found.place,
            "id": "?" if found.record_id is None else found.record_id,
            "reason": found.reason,
          }
        )
        continue
      data, loses_tag = found
      write(data)
      digest.update(data)
      count += 1
      turned += loses_tag
  return count, digest.hexdigest(), turned


def _digest(path: pathlib.Path, shards: ShardFormat) -> tuple[int, str]:
  digest = hashlib.sha256()
  count = 0
  for data in shards.read(path):
    digest.update(data)
    count += 1
  return count, digest.hexdigest()


def _with_stored_image(record: Record, job: Job) -> Record:
  """Returns the record with the picture and the box to store."""
  side = job.image_size
  if not side:
    return record
  pixels = images.prepare_image(record.image, (side, side))
  out = io.BytesIO()
  # No chroma subsampling: answers are about small coloured objects.
  Image.fromarray(pixels).save(out, "JPEG", quality=job.quality, subsampling=0)
  box = record.box
  if box is not None:
    width, height = images.original_size(record.image)
    scale_x, scale_y = side / width, side / height
    box = (
      box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y,
    )  # fmt: skip
  return dataclasses.replace(record, image=out.getvalue(), box=box)


class BadAccount:
  """Counts bad records, logs the first ones, and raises if too many."""

  def __init__(self, job: Job, max_bad_fraction: float) -> None:
    self._job = job
    self._limit = max_bad_fraction
    self._bad = 0
    self._logged = 0

  def add(self, note: dict[str, Any], *, log: bool = True) -> None:
    """Counts the bad records of a shard, given its note.

    Raises:
      UserError: too many records are bad.
    """
    self._bad += len(note["bad"])
    for bad in note["bad"] if log else ():
      self._logged += 1
      if self._logged <= _MAX_LOGGED:
        warn(
          f"bad record left out: {bad['place']} ({bad['id']}): {bad['reason']}"
        )
      elif self._logged == _MAX_LOGGED + 1:
        warn(f"more bad records: see bad_records in {MANIFEST}")
    if self._bad > self._limit * self._job.count:
      last = note["bad"][-1] if note["bad"] else {"place": "?", "reason": "?"}
      raise UserError(
        f"{self._bad} of {self._job.count} records are bad, such as"
        f" {last['place']}: {last['reason']}; correct the data, or allow more"
        " with"
        f" --max_bad_fraction (now {self._limit:g}){CONTINUE}"
      )
