"""TensorFlow Datasets, read without TensorFlow.

`coco_captions` and `ref_coco` are known. Any other data set needs a mapping
from fields of `Record` to its features; docs/data.md lists the fields.

    train_source("tfds", "vqa", name="my_vqa", fields={
      "image": "image", "prompt": "question", "target": "answers"})
"""

import collections
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from narvl_jax.data.answer_text import normalize_answer
from narvl_jax.data.example import TASKS, Box, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.sources import fields as checked
from narvl_jax.data.sources.base import RecordSource, find_part
from narvl_jax.data.sources.tfds import index as tfds_index
from narvl_jax.data.sources.tfds import prepared as tfds_prepared
from narvl_jax.data.sources.tfds.fields import (
  make_parser,
  make_selector,
  text,
  texts,
)
from narvl_jax.data.sources.tfds.layouts import (
  box_format_of,
  check_fields,
  counter,
  layout,
  needed_fields,
)
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.files.store_cache import file_state
from narvl_jax.files.stores import as_path


class TfdsSource(RecordSource):
  """Records of a data set that TFDS has prepared as ArrayRecord files."""

  def __init__(
    self,
    *,
    task: str,
    split: str,
    name: str = "",
    data_dir: str = "",
    fields: Mapping[str, str] | None = None,
    each: str | None = None,
    box_format: str = "",
    labels: Mapping[str, str] | None = None,
    soft_scores: bool = False,
    index_dir: str = "",
  ) -> None:
    """Opens the data set.

    Args:
      split: such as "train", "train[:50%]" or "train+restval".
      name: NAME, NAME/CONFIG, NAME:VERSION, or a folder of a data set.
      data_dir: folder of all data sets; "" is the default of TFDS.
      fields: field of `Record` -> path of a feature; extends the layout of a
        known data set.
      each: path of the sequence whose elements are the records; "" makes one
        record per example; None uses the layout of a known data set.
      box_format: one of `BOX_FORMATS`, for a box that does not state its own.
      labels: renames targets, such as {"0": "entailment"}.
      soft_scores: an answer that n people gave has the score min(1, 0.3 n).
      index_dir: folder of the index of records; "" is the user's cache.

    Raises:
      UserError: an option is wrong, or the data set is not prepared.
    """
    fields, labels = dict(fields or {}), dict(labels or {})
    self._options: dict[str, Any] = {
      "task": task, "split": split, "name": name,
      "data_dir": data_dir, "fields": fields, "each": each,
      "box_format": box_format, "labels": labels, "soft_scores": soft_scores,
      "index_dir": index_dir,
    }  # fmt: skip
    if task not in TASKS:
      raise UserError(
        f'tfds: there is no task "{task}".{did_you_mean(task, TASKS)} Set task'
      )
    if not name:
      raise UserError(
        "tfds: options.name is missing; set it to NAME or NAME/CONFIG of a"
        " data set"
      )
    self.task, self.split = task, split
    builder = tfds_prepared.open_builder(name, data_dir)
    self._full_name = builder.info.full_name
    self._data = tfds_prepared.data_source(builder, split)
    known, each = layout(builder.name, split, each)
    mapping = {**needed_fields(task, known), **fields}
    check_fields(builder.name, task, mapping)
    self._selectors = {
      field: make_selector(builder.info.features, path, each, field=field)
      for field, path in mapping.items()
    }
    self._parse = make_parser(
      builder.info.features, list(self._selectors.values())
    )
    self._each = each
    self._counter = counter(self._selectors, each)
    self._box_format = box_format_of(self._selectors.get("box"), box_format)
    self._labels = labels
    self._soft_scores = soft_scores
    self._files = _files_key(builder, split)
    self._ends: np.ndarray | None = None
    if self._counter is not None:
      key = f"{self._files} {each}"
      self._ends = tfds_index.record_ends(
        key, len(self._data), index_dir, self._records_of
      )
    if not len(self):
      raise UserError(
        f'tfds: no example of {self._full_name} "{split}" has an element in'
        f' "{each}"; set options.each'
      )

  def __len__(self) -> int:
    return len(self._data) if self._ends is None else int(self._ends[-1])

  def _read(self, number: int) -> Record:
    example_number, element = self._find(number)
    return self._record(self._example(example_number), element, number)

  def _place(self, number: int) -> str:
    """Returns "NAME/CONFIG/VERSION SPLIT example N"."""
    example, element = self._find(number)
    place = f"{self._full_name} {self.split} example {example}"
    return f"{place}, {self._each} {element}" if self._each else place

  def fingerprint(self) -> str:
    """Returns a hash of names, sizes and times of the data set's files."""
    return self._files

  def __getstate__(self) -> dict[str, Any]:
    return {**self._options, "exif_orientation": self.exif_orientation}

  def __setstate__(self, state: dict[str, Any]) -> None:
    # TFDS keeps files open, so another process opens its own.
    options = dict(state)
    exif_orientation = options.pop("exif_orientation")
    self.__init__(**options)
    self.exif_orientation = exif_orientation

  def _find(self, number: int) -> tuple[int, int]:
    """Returns the number of the example, and of the record in it."""
    return (number, 0) if self._ends is None else find_part(self._ends, number)

  def _example(self, number: int) -> Any:
    try:
      return self._parse(self._data[number])
    except Exception as e:  # Damaged data raises errors of many types.
      raise UserError(
        f"the stored example cannot be read ({e}); prepare the data set again"
      ) from e

  def _records_of(self, number: int) -> int:
    assert self._counter is not None
    try:
      return sum(self._counter.lengths(self._example(number)))
    except UserError:
      return 1  # Reading it makes a bad record.

  def _record(self, example: Any, element: int, number: int) -> Record:
    place = self._counter.place(example, element) if self._counter else []
    values = {
      field: selector.select(example, place)
      for field, selector in self._selectors.items()
    }
    image = values["image"]
    if not isinstance(image, bytes) or not image:
      raise UserError(
        f'the feature "{self._selectors["image"].path}" is'
        f" a value of type {type(image).__name__}, not an encoded picture"
      )
    objects = values.get("objects")
    return Record(
      id=self._id(values.get("id"), element, number),
      task=self.task,
      image=image,
      prompt=text(values.get("prompt")),
      premise=text(values.get("premise")),
      objects=None if objects is None else tuple(texts(objects)),
      kind=text(values.get("kind")),
      answers=self._answers(values) if "target" in values else {},
      box=self._box(values["box"], image) if "box" in values else None,
    )

  def _id(self, value: Any, element: int, number: int) -> str:
    if value is None:
      return f"{self.split}-{number}"
    # All records of the example share its id.
    shared = self._each and not self._selectors["id"].common
    return f"{text(value)}-{element}" if shared else text(value)

  def _answers(self, values: Mapping[str, Any]) -> dict[str, float]:
    targets = [self._labels.get(t, t) for t in texts(values["target"])]
    if self.task == "caption":
      return checked.captions(targets)
    if self.task == "entailment":
      if len(targets) != 1:
        raise UserError(f"there are {len(targets)} labels; there must be one")
      return checked.entailment_answer(targets[0].strip())
    if "score" in values:
      scores = values["score"]
      scores = scores if isinstance(scores, list) else [scores]
      if len(scores) != len(targets):
        raise UserError(f"{len(targets)} answers have {len(scores)} scores")
      return checked.scored_answers(zip(targets, scores, strict=True))
    people = collections.Counter(map(normalize_answer, targets))
    return checked.scored_answers(
      (answer, min(1.0, 0.3 * n) if self._soft_scores else 1.0)
      for answer, n in people.items()
    )

  def _box(self, values: Any, image: bytes) -> Box:
    if not isinstance(values, list) or len(values) != 4:
      raise UserError(
        f"the box is {checked.quoted(values)}; it must be four numbers"
      )
    a, b, c, d = values
    if self._box_format.endswith("YXYX"):
      a, b, c, d = b, a, d, c
    elif self._box_format == "XYWH":
      c, d = a + c, b + d
    if self._box_format.startswith("REL_"):
      width, height = images.original_size(
        images.with_orientation(image, self.exif_orientation)
      )
      a, b, c, d = a * width, b * height, c * width, d * height
    return checked.pixel_box((a, b, c, d))


def _files_key(builder: Any, split: str) -> str:
  """Returns a hash of the split and of its files."""
  stats = []
  for part in builder.info.splits[split].file_instructions:
    file = as_path(str(part.filename))
    stats.append([file.name, part.skip, part.take, *file_state(file)])
  key = json.dumps([builder.info.full_name, str(builder.data_dir), stats])
  return hashlib.sha256(key.encode()).hexdigest()
