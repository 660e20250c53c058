"""Records to batches of fixed shape, on grain.

A training batch is a pure function of (seed, position), where the position is
the number of batches before it: a run that resumes sees what an uninterrupted
run would have seen, whatever the number of hosts, worker processes and threads.
A checkpoint stores nothing of the data but the position, which is the step
unless the run has passed over some batches.

A bad record (unreadable picture, empty prompt, text over the limit, ...) is
counted, logged once and replaced by the next good record of its source, which
keeps the above true. Too many of them stop the run.
"""

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import grain
import numpy as np

from narvl_jax.data.batches import workers
from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.batches.bad_records import BadRecords as BadRecords
from narvl_jax.data.batches.batching import AnyTask, Batch, Prepared
from narvl_jax.data.batches.batching import Batcher as Batcher
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.batches.mixture import Draw, Mixture
from narvl_jax.data.batches.shared_batches import Segments, SharedBatch
from narvl_jax.data.example import Record
from narvl_jax.errors import UserError, did_you_mean

# So many bad neighbours are no accident.
_MAX_BAD_RUN = 100


def train_batches(
  entries: Sequence[MixtureEntry],
  tasks: Mapping[str, AnyTask],
  position: int,
  *,
  batch_size: int,
  seed: int,
  image_size: tuple[int, int],
  max_text_length: int,
  max_label_length: int,
  rows: Sequence[int] | None = None,
  temperature: float = 0.0,
  num_workers: int = 0,
  num_threads: int = 1,
  prefetch: int = 2,
  bad_records: BadRecords | None = None,
) -> "TrainBatches":
  """Returns endless training batches, each a function of (seed, position).

  Args:
    entries: sources to mix.
    tasks: name -> task.
    position: number of batches that were used or passed over already.
    batch_size: examples of all hosts together.
    seed: of the order.
    image_size: (height, width) in pixels.
    max_text_length: T, tokens of the source with bos and eos.
    max_label_length: L, labels of the target.
    rows: of every global batch, those that the batches have; all by default.
    temperature: see `Mixture`.
    num_workers: processes that prepare batches ahead; 0 has threads only.
    num_threads: threads, of each process, that prepare batches ahead; 0
      prepares them on demand.
    prefetch: batches that are prepared ahead, by each process.
    bad_records: keeps count; a new one if None.

  Returns:
    An iterator of batches as in `data/example.py`.

  Raises:
    UserError: the mixture makes no sense (at once), or too many records are
      bad (while iterating).
  """
  _check_entries(entries, tasks)
  mixture = Mixture(
    entries,
    batch_size=batch_size,
    seed=seed,
    rows=rows,
    temperature=temperature,
  )
  batcher = Batcher(image_size, max_text_length, max_label_length)
  reader = _TrainReader(entries, tasks, batcher, seed)
  # Whole batches, since grain costs more per element than an example does.
  batches = grain.MapDataset.source(mixture).map(reader)[position:]
  ahead = batches.to_iter_dataset(_read_options(num_threads, prefetch))
  segments = None
  if num_workers:
    size = batcher.shared_bytes(len(mixture[0]))
    # In the making or ready, in the queue, fetched by grain ahead of use, and
    # some on the way.
    segments = Segments(num_workers, 3 * max(prefetch, 1) + 4, size)
    ahead = workers.in_processes(ahead, num_workers, prefetch, segments)
  bad_records = bad_records or BadRecords()
  return TrainBatches(iter(ahead), mixture, entries, bad_records, segments)


class TrainBatches(Iterator[Batch]):
  """The batches of `train_batches`.

  Bad records are accounted for here and not where they are met: each process
  knows of its own only.

  Attributes:
    bad_records: those of the batches handed out so far.
  """

  def __init__(
    self,
    batches: Any,
    mixture: Mixture,
    entries: Sequence[MixtureEntry],
    bad_records: BadRecords,
    segments: Segments | None = None,
  ) -> None:
    """Takes grain's iterator and what it was made from."""
    self._batches = batches
    self._segments = segments
    self._mixture = mixture
    self._sizes = {entry.name: len(entry.source) for entry in entries}
    self.bad_records = bad_records

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> Batch:
    with workers.failures_explained():
      batch, bad = next(self._batches)
    if isinstance(batch, SharedBatch):
      assert self._segments is not None
      batch = self._segments.fetch(batch)
    for record in bad:
      self.bad_records.report(record)
    if batch is None:
      raise UserError(
        f"{len(bad)} records of {bad[-1].name} in a row are bad, up to"
        f" {bad[-1].what}. Mend the data"
      )
    return batch

  def counters(self, position: int) -> dict[str, float]:
    """Returns what the run has used of each entry NAME after so many batches.

    `NAME/examples` and `NAME/epochs` count all hosts and all of the run,
    `NAME/bad` the different bad records that this host has met since it
    started.
    """
    counts: dict[str, float] = {}
    sizes = self._sizes.items()
    used = self._mixture.used(position)
    for (name, size), examples in zip(sizes, used, strict=True):
      counts[f"{name}/examples"] = examples
      counts[f"{name}/epochs"] = examples / size
      counts[f"{name}/bad"] = self.bad_records.count_of(name)
    return counts

  def examples(self, index: int) -> list[tuple[str, int]]:
    """Returns (name of the entry, number of the record) of all rows of a batch.

    In the place of a bad record the batch has the next good one of the entry.

    Args:
      index: of the batch; the first of a run is 0.
    """
    names = list(self._sizes)
    return [(names[x.entry], x.index) for x in self._mixture.whole(index)]

  def close(self) -> None:
    """Ends the threads and processes."""
    self._batches.close()
    if self._segments is not None:
      self._segments.close()


def eval_batches(
  source: Sequence[Record],
  task: AnyTask,
  *,
  batch_size: int,
  image_size: tuple[int, int],
  max_text_length: int,
  max_label_length: int,
  limit: int | None = None,
  rows: Sequence[int] | None = None,
  num_threads: int = 1,
  prefetch: int = 2,
  bad_records: BadRecords | None = None,
  name: str = "evaluation",
) -> Iterator[tuple[Batch, list[Record]]]:
  """Yields every record of a source once, in order, in batches of one shape.

  Each batch comes with the records of its first rows. The rows after them
  repeat the first row; the batch's "valid" (bool [B]) is False there. A bad
  record is counted and left out. A target that is absent or too long leaves
  `label_length` at 0: predictions need none. Several hosts share the records:
  with `rows` a batch has room for those rows of the global batch only.

  Args:
    source: records, random access.
    task: task of the records.
    batch_size: of all hosts together.
    image_size: (height, width) in pixels.
    max_text_length: T.
    max_label_length: L.
    limit: reads only so many records.
    rows: of every global batch, those that the batches have; all by default.
    num_threads: threads that prepare batches ahead; 0 prepares them on demand.
    prefetch: batches that are prepared ahead.
    bad_records: keeps count; a new one if None.
    name: of the source in messages.

  Raises:
    UserError: the source is empty or too many of its records are bad.
  """
  total = len(source) if limit is None else min(limit, len(source))
  if total < 1:
    raise UserError(
      f'there is no record to evaluate in "{name}"; check the split and'
      " --config.train.eval_examples"
    )
  bad = bad_records or BadRecords()
  batcher = Batcher(image_size, max_text_length, max_label_length)
  reader = RecordReader(source, name, total)
  own_rows = range(batch_size) if rows is None else rows

  def use(index: int, record: Record) -> tuple[Prepared, Record]:
    example = batcher.prepare(record, task, index=index, target="optional")
    return example, record

  def read(indices: Sequence[int]) -> tuple[Batch, list[Record]]:
    batch = batcher.empty(len(own_rows))
    records: list[Record] = []
    for row in own_rows:
      if row >= len(indices):
        continue
      found = reader.read(indices[row], functools.partial(use, indices[row]))
      if isinstance(found, BadRecord):
        bad.report(found)
        continue
      example, record = found
      batcher.put(batch, len(records), example)
      records.append(record)
    filled = len(records)
    for key, value in batch.items():
      if key != "valid":
        value[filled:] = value[0]
    return batch, records

  batches = grain.MapDataset.range(total).batch(batch_size, batch_fn=read)
  yield from batches.to_iter_dataset(_read_options(num_threads, prefetch))


class _TrainReader:
  """Draws of one batch -> the batch and the bad records met."""

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
    rows = len(draws)
    segments = workers.own_segments()
    own = segments.take(self._batcher.shared_bytes(rows)) if segments else None
    image = own.first(self._batcher.image_shape(rows)) if own else None
    batch = self._batcher.empty(rows, image)
    bad: list[BadRecord] = []
    for row, draw in enumerate(draws):
      met = self._write_good(batch, row, draw)
      if met and not batch["valid"][row]:
        if own:
          own.free()
        return None, met
      bad += met
    return (own.pack("image", batch) if own else batch), bad

  def _write_good(self, batch: Batch, row: int, draw: Draw) -> list[BadRecord]:
    """Writes the first good record from the drawn one on."""
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
    rng = self._rng(draw) if task.augments else None
    return self._batcher.prepare(record, task, index=index, rng=rng)

  def _rng(self, draw: Draw) -> np.random.Generator:
    """Depends on the place in the order only: each epoch changes anew."""
    return np.random.default_rng([*self._words[draw.entry], draw.position, 1])


def _check_entries(
  entries: Sequence[MixtureEntry], tasks: Mapping[str, AnyTask]
) -> None:
  if not entries:
    raise UserError("there is no training data; set --config.data.train")
  names = [entry.name for entry in entries]
  for entry in entries:
    if entry.task not in tasks:
      raise UserError(
        f'--config.data.train.{entry.name}.task is "{entry.task}".'
        f"{did_you_mean(entry.task, tasks)}"
      )
    if names.count(entry.name) > 1:
      raise UserError(
        f'two entries of --config.data.train are named "{entry.name}";'
        " rename one"
      )


def _read_options(num_threads: int, prefetch: int) -> grain.ReadOptions:
  # Without threads grain must not be given a buffer, and the reverse.
  threads = num_threads if prefetch else 0
  return grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
  )
