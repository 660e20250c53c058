"""The schema of records, which every source returns and every task reads.

A task converts a `Record` (raw data with the ground truth) to an example for
the model, a dict of fixed-shape NumPy arrays:

| key          | shape    | dtype   | meaning                                  |
| ------------ | -------- | ------- | ---------------------------------------- |
| image        | [H,W,3]  | uint8   | resized picture, normalised on device    |
| image_mask   | []       | bool    | False: no picture                        |
| text         | [T]      | int32   | source ids, right padded with pad        |
| labels       | [L]      | int32   | target ids, right padded with pad        |
| label_length | []       | int32   | number of labels                         |
| confidence   | []       | float32 | weight of the target; 1 except for VQA   |
| task         | []       | int32   | index into `TASKS`                       |
| index        | []       | int64   | position of the record in its source     |
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

TASKS = ("caption", "vqa", "grounding", "entailment")

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
  """One request with its ground truth; compared by content.

  Attributes:
    id: name of the record, unique within its source and split.
    task: one of `TASKS`.
    image: bytes of a picture file (`pictures.files.Upright` if its EXIF
      orientation applies), or uint8 [H, W, 3].
    prompt: question (VQA), referring expression (grounding), hypothesis
      (entailment); unused by captions.
    answers: valid answers with their scores in (0, 1]. Captions: every
      reference with 1. Entailment: one of "yes", "no", "maybe" with 1. Empty if
      the truth is unknown or the task is grounding.
    box: grounding only: x0, y0, x1, y1 in pixels of the original image.
    premise: entailment only: caption of the picture, may be empty.
    objects: VQA only: names of detected objects; None omits the object prompt.
    kind: sub-category for reports, such as "count" or "attribute".
    question_type: VQA only: first words of the question by the annotations of
      VQA v2, such as "what color is the".
    score: log-probability of the target if it is the answer of a teacher;
      otherwise None.
    annotators: VQA only: number of people whose answers determine the scores,
      see `answer_text.annotator_scores`; 0 if the scores were given directly.
    people: the unchanged answers of these people, for the official
      accuracy of VQA; for captions all references, equal ones included; empty
      if unknown.
  """

  id: str
  task: str
  image: bytes | np.ndarray
  prompt: str = ""
  answers: Mapping[str, float] = dataclasses.field(default_factory=dict)
  box: Box | None = None
  premise: str = ""
  objects: tuple[str, ...] | None = None
  kind: str = ""
  question_type: str = ""
  score: float | None = None
  annotators: int = 0
  people: tuple[str, ...] = ()

  def __eq__(self, other: object) -> bool:
    # The generated method fails on the truth value of compared arrays.
    if not isinstance(other, Record):
      return NotImplemented
    return all(
      _equal(getattr(self, field.name), getattr(other, field.name))
      for field in dataclasses.fields(self)
    )


def _equal(a: Any, b: Any) -> bool:
  if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
    return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
  return a == b
