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
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from narvl_jax.data import images
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.mixture import Entry, Mixture, WeightSchedule
from narvl_jax.data.tasks import Task
from narvl_jax.data.vocabulary import Vocabulary
from narvl_jax.errors import UserError, did_you_mean

# What reading a damaged record raises; anything else is a defect of ours.
_BAD = (ValueError, OSError, LookupError)
# So many bad neighbours are no accident.
_MAX_BAD_RUN = 100

Batch = dict[str, np.ndarray]
AnyTask = Task[Any]


class BadRecords:
  """Counts the bad records of a run and stops it when there are too many.

  Attributes:
    max_fraction: of the records of a source that may be bad.
  """

  def __init__(self, max_fraction: float = 0.01) -> None:
    self.max_fraction = max_fraction
    self._seen: dict[str, set[int]] = {}
    self._lock = threading.Lock()

  @property
  def count(self) -> int:
    """Number of different bad records met so far."""
    with self._lock:
      return sum(len(seen) for seen in self._seen.values())

  def report(
    self, name: str, index: int, total: int, record_id: str, error: Exception
  ) -> None:
    """Takes note of a bad record.

    Args:
      name: of the entry.
      index: of the record in its source.
      total: number of records of the source.
      record_id: of the record, if it could be read.
      error: what is wrong with it.

    Raises:
      UserError: more than `max_fraction` of the source is bad.
    """
    with self._lock:
      seen = self._seen.setdefault(name, set())
      if index in seen:
        return
      seen.add(index)
      bad = len(seen)
    logging.warning(
      'skipped bad record %d "%s" of %s: %s', index, record_id, name, error
    )
    if bad > self.max_fraction * total:
      raise UserError(
        f"{bad} of {total} records of {name} are bad, more than"
        f" {self.max_fraction:.2%}; the last is record {index}"
        f' "{record_id}": {error}. Mend the data or set'
        " --config.data.max_bad_fraction"
      )


class Batcher:
  """Writes records into arrays of one fixed shape."""

  def __init__(
    self,
    image_size: tuple[int, int],
    max_text_length: int,
    max_label_length: int,
  ) -> None:
    """Fixes the shapes: image (height, width) in pixels, lengths in tokens."""
    self._image_size = image_size
    self._max_text_length = max_text_length
    self._max_label_length = max_label_length

  def empty(self, rows: int) -> Batch:
    """Returns arrays for `rows` examples, filled with padding."""
    height, width = self._image_size
    return {
      "image": np.zeros((rows, height, width, 3), np.uint8),
      "image_mask": np.ones(rows, bool),
      "text": np.full(
        (rows, self._max_text_length), Vocabulary.pad_id, np.int32
      ),
      "labels": np.full(
        (rows, self._max_label_length), Vocabulary.pad_id, np.int32
      ),
      "label_length": np.zeros(rows, np.int32),
      "confidence": np.ones(rows, np.float32),
      "task": np.zeros(rows, np.int32),
      "index": np.zeros(rows, np.int64),
    }

  def write(
    self,
    batch: Batch,
    row: int,
    record: Record,
    task: AnyTask,
    *,
    index: int = 0,
    target: str = "required",
  ) -> None:
    """Writes one record into a row that `empty` made; all of it or nothing.

    Args:
      batch: arrays of `empty`.
      row: which row.
      record: the record.
      task: its task.
      index: position of the record in its source.
      target: "required", "optional" (left out if the record has no target or
        one that is too long) or "none".

    Raises:
      UserError: the record is bad.
    """
    text, labels, confidence = self._encode(record, task, target)
    image = images.prepare_image(record.image, self._image_size)
    batch["image"][row] = image
    batch["text"][row, : len(text)] = text
    batch["labels"][row, : len(labels)] = labels
    batch["label_length"][row] = len(labels)
    batch["confidence"][row] = confidence
    batch["task"][row] = TASKS.index(task.name)
    batch["index"][row] = index

  def _encode(
    self, record: Record, task: AnyTask, target: str
  ) -> tuple[list[int], list[int], float]:
    try:
      encoded = task.encode(record, with_target=target != "none")
      self._check_labels(len(encoded.label_ids), record, task)
    except UserError:
      if target != "optional":
        raise
      encoded = task.encode(record, with_target=False)
    length = len(encoded.text_ids)
    if length > self._max_text_length:
      raise UserError(
        f'the prompt of {task.name} record "{record.id}" has {length} tokens'
        f" with bos and eos, the limit is {self._max_text_length}; shorten it"
        f" or train with --config.data.max_text_length={length}"
      )
    return encoded.text_ids, encoded.label_ids, encoded.confidence

  def _check_labels(self, length: int, record: Record, task: AnyTask) -> None:
    if length > self._max_label_length:
      raise UserError(
        f'the target of {task.name} record "{record.id}" has {length} labels,'
        f" the limit is {self._max_label_length}; set"
        f" --config.data.max_label_length={length}"
      )


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
  host_index: int = 0,
  host_count: int = 1,
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
    host_index: which host this is.
    host_count: number of hosts; a batch has batch_size / host_count rows.
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
  mixture = Mixture(
    mixed,
    batch_size=batch_size,
    seed=seed,
    host_index=host_index,
    host_count=host_count,
  )
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
  num_threads: int = 1,
  prefetch: int = 2,
  bad_records: BadRecords | None = None,
  name: str = "evaluation",
) -> Iterator[tuple[Batch, list[Record]]]:
  """Yields every record of a source once, in order, in batches of one shape.

  Each batch comes with the records of its first rows. The rows after them
  repeat the first row; the batch's "valid" (bool [B]) is False there. A bad
  record is counted and left out. A target that is absent or too long leaves
  `label_length` at 0: predictions need none.

  Args:
    source: records, random access.
    task: task of the records.
    batch_size: B.
    image_size: (height, width) in pixels.
    max_text_length: T.
    max_label_length: L.
    limit: reads only so many records.
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

  def read(indices: Sequence[int]) -> tuple[Batch, list[Record]]:
    batch = batcher.empty(batch_size)
    records: list[Record] = []
    for index in indices:
      record = None
      try:
        record = source[index]
        batcher.write(
          batch, len(records), record, task, index=index, target="optional"
        )
        records.append(record)
      except _BAD as e:
        bad.report(name, index, total, record.id if record else "?", e)
    filled = len(records)
    for value in batch.values():
      value[filled:] = value[0]
    batch["valid"] = np.arange(batch_size) < filled
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
      except _BAD as e:
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
