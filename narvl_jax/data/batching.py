"""Records to rows of fixed-shape arrays, and the account of bad records."""

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from narvl_jax.data import images, shared_batches, sources
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.tasks import Task
from narvl_jax.data.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.terminal import warn

# Characters at either end of a long reason that are kept.
_REASON_PART = 200

Batch = dict[str, np.ndarray]
AnyTask = Task[Any]


def short_reason(error: Exception) -> str:
  """Returns what is wrong in one line, without the whole of a long field."""
  reason = " ".join(str(error).split()) or type(error).__name__
  if len(reason) > 2 * _REASON_PART:
    reason = f"{reason[:_REASON_PART]} ... {reason[-_REASON_PART:]}"
  return reason


@dataclasses.dataclass(frozen=True)
class BadRecord:
  """A record that could not be used; travels from worker to main process.

  Attributes:
    name: of the entry or data set.
    index: of the record in its source.
    total: number of records of the source.
    what: place, id and fault in words.
  """

  name: str
  index: int
  total: int
  what: str

  @classmethod
  def of(
    cls,
    name: str,
    source: Sequence[Record],
    index: int,
    record: Record | None,
    error: Exception,
    total: int | None = None,
  ) -> "BadRecord":
    """Describes a fault.

    Args:
      name: of the entry or data set.
      source: where the record comes from.
      index: its place there.
      record: None if it could not even be read.
      error: what is wrong with it.
      total: of how many records, if not all of the source.
    """
    place = sources.locate(source, index)
    if record is not None and record.id:
      place += f' (id "{record.id}")'
    reason = short_reason(error)
    total = len(source) if total is None else total
    return cls(name, index, total, f"{place}: {reason}")


class BadRecords:
  """Counts the bad records of a run and stops it when there are too many.

  Attributes:
    max_fraction: of the records of a source that may be bad.
  """

  def __init__(self, max_fraction: float = 0.01) -> None:
    self.max_fraction = max_fraction
    self._seen: dict[str, set[int]] = collections.defaultdict(set)
    self._lock = threading.Lock()

  @property
  def count(self) -> int:
    """Number of different bad records met so far."""
    with self._lock:
      return sum(len(seen) for seen in self._seen.values())

  def count_of(self, name: str) -> int:
    """Returns the number of different bad records of one entry."""
    with self._lock:
      return len(self._seen[name])

  def report(self, record: BadRecord) -> None:
    """Takes note of a bad record; logs it the first time.

    Raises:
      UserError: more than `max_fraction` of the source is bad.
    """
    with self._lock:
      seen = self._seen[record.name]
      if record.index in seen:
        return
      seen.add(record.index)
      bad = len(seen)
    warn(f"skipped a bad record of {record.name}: {record.what}")
    if bad > self.max_fraction * record.total:
      raise UserError(
        f"{bad} of {record.total} records of {record.name} are bad, more than"
        f" {self.max_fraction:.2%}; the last is {record.what}. Mend the data"
        " or set --config.data.max_bad_fraction (evaluate: --max_bad_fraction)"
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

  def shared_bytes(self, rows: int) -> int:
    """Returns the bytes of a segment for `rows` examples."""
    one = self.empty(1)
    whole = {
      key: np.broadcast_to(x, (rows, *x.shape[1:])) for key, x in one.items()
    }
    return shared_batches.segment_bytes(whole)

  def image_shape(self, rows: int) -> tuple[int, int, int, int]:
    """Returns the shape of the pictures of `rows` examples."""
    return (rows, *self._image_size, 3)

  def empty(self, rows: int, image: np.ndarray | None = None) -> Batch:
    """Returns arrays for `rows` examples, filled with padding.

    "valid" (bool) is False until a record is written into the row.

    Args:
      rows: number of examples.
      image: uint8 of `image_shape(rows)` to use; zeros if None.
    """
    if image is None:
      image = np.zeros(self.image_shape(rows), np.uint8)
    return {
      "image": image,
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
      "valid": np.zeros(rows, bool),
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
    rng: np.random.Generator | None = None,
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
      rng: draws the random changes that the task's settings ask for; without
        it there are none.

    Raises:
      UserError: the record is bad.
    """
    change = None
    if rng is not None:
      record, change = task.augment(record, rng)
    text, labels, confidence = self._encode(record, task, target)
    image = images.prepare_image(record.image, self._image_size, change)
    batch["image"][row] = image
    batch["text"][row, : len(text)] = text
    batch["labels"][row, : len(labels)] = labels
    batch["label_length"][row] = len(labels)
    batch["confidence"][row] = confidence
    batch["task"][row] = TASKS.index(task.name)
    batch["index"][row] = index
    batch["valid"][row] = True

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
