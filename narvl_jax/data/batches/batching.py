"""Records as rows of fixed-shape arrays."""

from typing import Any, NamedTuple

import numpy as np

from narvl_jax.data.batches.shared_batches import Layout
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.tasks import Task
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError

Batch = dict[str, np.ndarray]
AnyTask = Task[Any]


class Prepared(NamedTuple):
  """One example that is not part of a batch yet.

  Attributes:
    image: uint8 [H, W, 3].
    text: token ids of the source.
    labels: token ids of the target.
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
    """Sets the shapes: image (height, width) in pixels, lengths in tokens."""
    self._image_size = image_size
    self._max_text_length = max_text_length
    self._max_label_length = max_label_length

  def layout(self, rows: int) -> Layout:
    """Returns dtypes and shapes of a batch; see `data/example.py`."""
    fields: dict[str, tuple[Any, tuple[int, ...]]] = {
      "image": (np.uint8, (*self._image_size, 3)),
      "image_mask": (bool, ()),
      "text": (np.int32, (self._max_text_length,)),
      "labels": (np.int32, (self._max_label_length,)),
      "label_length": (np.int32, ()),
      "confidence": (np.float32, ()),
      "task": (np.int32, ()),
      "index": (np.int64, ()),
      "valid": (bool, ()),
    }
    return {
      key: (np.dtype(dtype).str, (rows, *shape))
      for key, (dtype, shape) in fields.items()
    }

  def empty(self, rows: int, into: Batch | None = None) -> Batch:
    """Returns a batch of padding.

    "valid" (bool) is False until a record is written into the row.

    Args:
      into: arrays of `layout(rows)` to use. Their pictures are left as they
        are. None makes new arrays.
    """
    batch = into or {
      key: np.zeros(shape, dtype)
      for key, (dtype, shape) in self.layout(rows).items()
    }
    for key in ("text", "labels"):
      batch[key][...] = Vocabulary.pad_id
    for key in ("label_length", "task", "index", "valid"):
      batch[key][...] = 0
    for key in ("image_mask", "confidence"):
      batch[key][...] = 1
    return batch

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
      target: "required", "optional" (left out if the record has no target or
        one that is too long) or "none".
      rng: draws the random changes that the task's settings ask for; None
        makes no changes.

    Raises:
      UserError: the record is bad. `RecordReader` treats other errors alike.
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
    """Prepares a record and writes it into a row; writes nothing if it is bad.

    Raises:
      UserError: the record is bad.
    """
    self.put(batch, row, self.prepare(record, task, **options))

  def put(self, batch: Batch, row: int, example: Prepared) -> None:
    """Writes an example into a row of `empty`."""
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
      length = len(encoded.label_ids)
      if length > self._max_label_length:
        raise UserError(
          f'the target of {task.name} record "{record.id}" has {length} labels,'
          f" the limit is {self._max_label_length}; set"
          f" --config.data.max_label_length={length}"
        )
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
