"""Records to rows of fixed-shape arrays."""

from typing import Any, NamedTuple

import numpy as np

from narvl_jax.data.batches import shared_batches
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.tasks import Task
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError

Batch = dict[str, np.ndarray]
AnyTask = Task[Any]


class Prepared(NamedTuple):
  """One example, before it is a row of a batch.

  Attributes:
    image: uint8 [H, W, 3].
    text: ids of the source.
    labels: ids of the target.
    confidence: weight of the target.
    task: name of the task.
    index: position of the record in its source.
  """

  image: np.ndarray
  text: list[int]
  labels: list[int]
  confidence: float
  task: str
  index: int


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

  def prepare(
    self,
    record: Record,
    task: AnyTask,
    *,
    index: int = 0,
    target: str = "required",
    rng: np.random.Generator | None = None,
  ) -> Prepared:
    """Augments, tokenises and decodes one record.

    Args:
      record: the record.
      task: its task.
      index: position of the record in its source.
      target: "required", "optional" (left out if the record has no target or
        one that is too long) or "none".
      rng: draws the random changes that the task's settings ask for; without
        it there are none.

    Raises:
      UserError: the record is bad; `RecordReader` takes any other error for
        the same.
    """
    change = None
    if rng is not None:
      record, change = task.augment(record, rng)
    text, labels, confidence = self._encode(record, task, target)
    image = images.prepare_image(record.image, self._image_size, change)
    return Prepared(image, text, labels, confidence, task.name, index)

  def write(
    self, batch: Batch, row: int, record: Record, task: AnyTask, **options: Any
  ) -> None:
    """Prepares one record and writes it, all of it or nothing.

    Args:
      batch: arrays of `empty`.
      row: which row.
      record: the record.
      task: its task.
      **options: see `prepare`.

    Raises:
      UserError: the record is bad.
    """
    self.put(batch, row, self.prepare(record, task, **options))

  def put(self, batch: Batch, row: int, example: Prepared) -> None:
    """Writes an example into a row that `empty` made."""
    batch["image"][row] = example.image
    batch["text"][row, : len(example.text)] = example.text
    batch["labels"][row, : len(example.labels)] = example.labels
    batch["label_length"][row] = len(example.labels)
    batch["confidence"][row] = example.confidence
    batch["task"][row] = TASKS.index(example.task)
    batch["index"][row] = example.index
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
