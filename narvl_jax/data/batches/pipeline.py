"""Records to batches of fixed shape, on grain.

A training batch is a pure function of (seed, position). The position is the
number of batches before it. A resumed run therefore reads the same batches as
an uninterrupted one, with any number of hosts, worker processes and threads. A
checkpoint stores only the position of the data, which is the step unless the
run has skipped batches.

A bad record (unreadable picture, empty prompt, text over the limit, ...) is
counted, logged once and replaced by the next good record of its source, which
keeps batches reproducible. Too many bad records stop the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import grain

from narvl_jax.data.batches import workers
from narvl_jax.data.batches.bad_records import BadRecords as BadRecords
from narvl_jax.data.batches.bad_records import RecordReader
from narvl_jax.data.batches.batching import AnyTask, Batch
from narvl_jax.data.batches.batching import Batcher as Batcher
from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.data.batches.readers import EvalReader, TrainReader
from narvl_jax.data.batches.shared_batches import Segments, SharedBatch
from narvl_jax.data.example import Record
from narvl_jax.errors import UserError


def train_batches(
  mixture: Mixture,
  tasks: Mapping[str, AnyTask],
  position: int,
  batcher: Batcher,
  *,
  num_workers: int = 0,
  num_threads: int = 1,
  prefetch: int = 2,
  bad_records: BadRecords | None = None,
) -> "TrainBatches":
  """Returns endless training batches, each a function of (seed, position).

  Args:
    position: number of batches that were used or skipped already.
    num_workers: processes that prepare batches ahead; 0 uses threads only.
    num_threads: threads, of each process, that prepare batches ahead; 0
      prepares them on demand.
    prefetch: batches that each process prepares ahead.
    bad_records: counts bad records; a new one if None.

  Returns:
    An iterator of batches as described in `data/example.py`.

  Raises:
    UserError: too many records are bad (while iterating).
  """
  reader = TrainReader(mixture.entries, tasks, batcher, mixture.seed)
  # Whole batches: grain's cost per element exceeds that of an example.
  batches = grain.MapDataset.source(mixture).map(reader)[position:]
  ahead = batches.to_iter_dataset(_read_options(num_threads, prefetch))
  segments = None
  if num_workers:
    # For batches that are being made, ready, in the queue or fetched by grain
    # ahead of use, and some in transfer.
    count = 3 * max(prefetch, 1) + 4
    segments = Segments(num_workers, count, batcher.layout(len(mixture[0])))
    ahead = workers.in_processes(ahead, num_workers, prefetch, segments)
  bad_records = bad_records or BadRecords()
  return TrainBatches(iter(ahead), mixture, bad_records, segments)


class TrainBatches(Iterator[Batch]):
  """The batches of `train_batches`.

  Bad records are counted here, because a worker process knows only its own.

  Attributes:
    bad_records: counts those of the batches returned so far.
  """

  def __init__(
    self,
    batches: Any,
    mixture: Mixture,
    bad_records: BadRecords,
    segments: Segments | None = None,
  ) -> None:
    self._batches = batches
    self._segments = segments
    self._mixture = mixture
    self._sizes = {entry.name: len(entry.source) for entry in mixture.entries}
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
        f" {bad[-1].what}. Correct the data"
      )
    return batch

  def counters(self, position: int) -> dict[str, float]:
    """Returns the use of each entry NAME by the first `position` batches.

    `NAME/examples` and `NAME/epochs` count all hosts since the beginning of the
    run, `NAME/bad` the different bad records of this host since it started.
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
    """Returns (entry name, record number) of all rows of batch number `index`.

    A batch has the next good record of the entry in place of a bad record.
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
  batcher: Batcher,
  *,
  batch_size: int,
  rows: Sequence[int] | None = None,
  num_threads: int = 1,
  prefetch: int = 2,
  bad_records: BadRecords | None = None,
  name: str = "evaluation",
) -> Iterator[tuple[Batch, list[Record]]]:
  """Yields every record of a source once, in order, in batches of one shape.

  Each batch comes with the records of its first rows. The rows after them
  repeat the first row; the batch's "valid" (bool [B]) is False there. A bad
  record is counted and left out. `label_length` is 0 where the target is absent
  or too long, since predictions need none.

  Args:
    batch_size: examples of all hosts together.
    rows: rows of every global batch to make; all by default.
    num_threads: threads that prepare batches ahead; 0 prepares them on demand.
    prefetch: batches that are prepared ahead.

  Raises:
    UserError: the source is empty or too many of its records are bad.
  """
  if not len(source):
    raise UserError(
      f'there is no record to evaluate in "{name}"; check the split and'
      " --config.train.eval_examples"
    )
  reader = EvalReader(
    RecordReader(source, name),
    task,
    batcher,
    range(batch_size) if rows is None else rows,
    bad_records or BadRecords(),
  )
  batches = grain.MapDataset.range(len(source)).batch(
    batch_size, batch_fn=reader
  )
  yield from batches.to_iter_dataset(_read_options(num_threads, prefetch))


def _read_options(num_threads: int, prefetch: int) -> grain.ReadOptions:
  # Grain accepts a buffer only with threads, and threads only with a buffer.
  threads = num_threads if prefetch else 0
  return grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
  )
