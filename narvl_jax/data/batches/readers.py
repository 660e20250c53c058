"""Reads the records of one batch and writes them into arrays."""

import functools
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from narvl_jax.data.batches import workers
from narvl_jax.data.batches.bad_records import (
  BadRecord,
  BadRecords,
  RecordReader,
)
from narvl_jax.data.batches.batching import AnyTask, Batch, Batcher, Prepared
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.batches.mixture import Draw
from narvl_jax.data.batches.shared_batches import SharedBatch
from narvl_jax.data.example import Record

# Number of consecutive bad records that is not an accident.
_MAX_BAD_RUN = 100


class TrainReader:
  """Draws of one batch -> the batch and the bad records that were met."""

  def __init__(
    self,
    entries: Sequence[MixtureEntry],
    tasks: Mapping[str, AnyTask],
    batcher: Batcher,
    seed: int,
  ) -> None:
    self._readers = [
      RecordReader(entry.source, entry.name) for entry in entries
    ]
    self._sizes = [len(entry.source) for entry in entries]
    self._tasks = [tasks[entry.task] for entry in entries]
    self._batcher = batcher
    self._words = [
      (seed % 2**32, zlib.crc32(entry.name.encode())) for entry in entries
    ]

  def __call__(
    self, draws: Sequence[Draw]
  ) -> tuple[Batch | SharedBatch | None, list[BadRecord]]:
    """Returns None for the batch if too many records in a row are bad."""
    segments = workers.own_segments()
    taken = segments.take() if segments else None
    shared, arrays = taken or (None, None)
    batch = self._batcher.empty(len(draws), arrays)
    bad: list[BadRecord] = []
    for row, draw in enumerate(draws):
      met = self._write_good(batch, row, draw)
      if met and not batch["valid"][row]:
        if segments and shared:
          segments.free(shared)
        return None, met
      bad += met
    return shared or batch, bad

  def _write_good(self, batch: Batch, row: int, draw: Draw) -> list[BadRecord]:
    """Writes the first good record, beginning with the drawn one."""
    total = self._sizes[draw.entry]
    bad: list[BadRecord] = []
    for i in range(min(_MAX_BAD_RUN, total)):
      index = (draw.index + i) % total
      found = self._readers[draw.entry].read(
        index, functools.partial(self._prepare, draw, index)
      )
      if not isinstance(found, BadRecord):
        self._batcher.put(batch, row, found)
        break
      bad.append(found)
    return bad

  def _prepare(self, draw: Draw, index: int, record: Record) -> Prepared:
    task = self._tasks[draw.entry]
    rng = None
    if task.augments:
      # A function of the position in the order: every epoch changes a record
      # again, and so does a resumed run.
      rng = np.random.default_rng([*self._words[draw.entry], draw.position, 1])
    return self._batcher.prepare(record, task, index=index, rng=rng)


class EvalReader:
  """Indices of one global batch -> the batch and the records of its rows."""

  def __init__(
    self,
    reader: RecordReader,
    task: AnyTask,
    batcher: Batcher,
    rows: Sequence[int],
    bad_records: BadRecords,
  ) -> None:
    self._reader = reader
    self._task = task
    self._batcher = batcher
    self._rows = rows
    self._bad_records = bad_records

  def __call__(self, indices: Sequence[int]) -> tuple[Batch, list[Record]]:
    """Returns a batch; rows after those of the records repeat the first row."""
    batch = self._batcher.empty(len(self._rows))
    records: list[Record] = []
    for index in (indices[row] for row in self._rows if row < len(indices)):
      found = self._reader.read(index, functools.partial(self._use, index))
      if isinstance(found, BadRecord):
        self._bad_records.report(found)
        continue
      example, record = found
      self._batcher.put(batch, len(records), example)
      records.append(record)
    for key, value in batch.items():
      if key != "valid":
        value[len(records) :] = value[0]
    return batch, records

  def _use(self, index: int, record: Record) -> tuple[Prepared, Record]:
    example = self._batcher.prepare(
      record, self._task, index=index, target="optional"
    )
    return example, record
