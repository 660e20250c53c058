"""Records to batches of fixed shape, on grain.

A training batch is a pure function of (seed, step): a run that resumes at a
step sees what an uninterrupted run would have seen, whatever the number of
hosts and threads. Nothing but the step is stored.

A bad record (unreadable picture, empty prompt, text over the limit, ...) is
counted, logged once and replaced by the next good record of its source, which
keeps the above true. Too many of them stop the run.
"""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain

from narvl_jax.data.batching import BAD_RECORD_ERRORS, AnyTask, Batch
from narvl_jax.data.batching import BadRecords as BadRecords
from narvl_jax.data.batching import Batcher as Batcher
from narvl_jax.data.example import Record
from narvl_jax.data.mixture import Entry, Mixture, WeightSchedule
from narvl_jax.errors import UserError, did_you_mean

# So many bad neighbours are no accident.
_MAX_BAD_RUN = 100


def train_batches(
  entries: Sequence[tuple[Any, str, WeightSchedule, str]],
  tasks: Mapping[str, AnyTask],
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  image_size: tuple[int, int],
  max_text_length: int,
  max_label_length: int,
  rows: Sequence[int] | None = None,
  num_threads: int = 1,
  prefetch: int = 2,
  bad_records: BadRecords | None = None,
) -> Iterator[Batch]:
  """Returns endless training batches, each a pure function of (seed, step).

  Args:
    entries: (source, task name, weight, name) each; see `Entry`.
    tasks: name -> task.
    batch_size: examples of all hosts together.
    seed: of the order.
    start_step: number of batches that were used already.
    image_size: (height, width) in pixels.
    max_text_length: T, tokens of the source with bos and eos.
    max_label_length: L, labels of the target.
    rows: of every global batch, those that the batches have; all by default.
    num_threads: threads that prepare batches ahead; 0 prepares them on demand.
    prefetch: batches that are prepared ahead.
    bad_records: keeps count; a new one if None.

  Returns:
    An iterator of batches as in `data/example.py`. It has `close()`, which
    ends its threads.

  Raises:
    UserError: the mixture makes no sense (at once), or too many records are
      bad (while iterating).
  """
  mixed = [Entry(*entry) for entry in entries]
  _check_entries(mixed, tasks)
  mixture = Mixture(mixed, batch_size=batch_size, seed=seed, rows=rows)
  batcher = Batcher(image_size, max_text_length, max_label_length)
  reader = _TrainReader(mixed, tasks, batcher, bad_records or BadRecords())
  # Whole batches, since grain costs more per element than an example does.
  batches = grain.MapDataset.source(mixture).map(reader)[start_step:]
  return iter(batches.to_iter_dataset(_read_options(num_threads, prefetch)))


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
  own_rows = range(batch_size) if rows is None else rows

  def read(indices: Sequence[int]) -> tuple[Batch, list[Record]]:
    batch = batcher.empty(len(own_rows))
    records: list[Record] = []
    for row in own_rows:
      if row >= len(indices):
        continue
      index, record = indices[row], None
      try:
        record = source[index]
        batcher.write(
          batch, len(records), record, task, index=index, target="optional"
        )
        records.append(record)
      except BAD_RECORD_ERRORS as e:
        bad.report(name, index, total, record.id if record else "?", e)
    filled = len(records)
    for key, value in batch.items():
      if key != "valid":
        value[filled:] = value[0]
    return batch, records

  batches = grain.MapDataset.range(total).batch(batch_size, batch_fn=read)
  yield from batches.to_iter_dataset(_read_options(num_threads, prefetch))


class _TrainReader:
  """Record numbers of one batch -> the batch."""

  def __init__(
    self,
    entries: Sequence[Entry],
    tasks: Mapping[str, AnyTask],
    batcher: Batcher,
    bad_records: BadRecords,
  ) -> None:
    self._entries = entries
    self._tasks = [tasks[entry.task] for entry in entries]
    self._lengths = [len(entry.source) for entry in entries]
    self._ends = list(itertools.accumulate(self._lengths))
    self._batcher = batcher
    self._bad = bad_records

  def __call__(self, numbers: Sequence[int]) -> Batch:
    batch = self._batcher.empty(len(numbers))
    for row, number in enumerate(numbers):
      entry = bisect.bisect_right(self._ends, number)
      index = number - self._ends[entry] + self._lengths[entry]
      self._write_good(batch, row, entry, index)
    return batch

  def _write_good(self, batch: Batch, row: int, entry: int, index: int) -> None:
    """Writes the first good record from `index` on."""
    source, _, _, name = self._entries[entry]
    total = self._lengths[entry]
    for _ in range(min(_MAX_BAD_RUN, total)):
      record = None
      try:
        record = source[index]
        self._batcher.write(batch, row, record, self._tasks[entry], index=index)
        return
      except BAD_RECORD_ERRORS as e:
        record_id = record.id if record else "?"
        self._bad.report(name, index, total, record_id, e)
        error = e
      index = (index + 1) % total
    raise UserError(
      f"{min(_MAX_BAD_RUN, total)} records of {name} in a row are bad, up to"
      f" record {(index - 1) % total}: {error}. Mend the data"
    )


def _check_entries(
  entries: Sequence[Entry], tasks: Mapping[str, AnyTask]
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
