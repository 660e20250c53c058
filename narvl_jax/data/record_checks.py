"""Checks that the fields of a record have the types and values of `Record`.

Records come from shards, data sets and users' sources, whose content is
untrusted. Code behind `RecordReader` relies on these checks.
"""

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from narvl_jax.data.answer_text import LONGEST_ANSWER
from narvl_jax.data.example import TASKS, Record
from narvl_jax.errors import UserError

_TEXTS = ("id", "prompt", "premise", "kind", "question_type")
_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxlist = _short.maxtuple = _short.maxdict = 8
_short.maxstring = _short.maxother = _short.maxlong = 120


def quoted(value: object) -> str:
  """Returns the `repr` of a value, cut where it is long or deep."""
  return _short.repr(value)


def checked_record(record: Any) -> Record:
  """Returns a record whose fields have the right types and values.

  NumPy scalars are accepted as numbers; a list or array of a box or of objects
  becomes a tuple. Not checked: whether the picture can be decoded, a box is
  within it, and a text can be tokenised.

  Raises:
    UserError: it is not a `Record`, or a field is wrong; the message names it.
  """
  if not isinstance(record, Record):
    raise UserError(
      f"the source returned {quoted(record)}; it must return a Record"
    )
  for name in _TEXTS:
    value = getattr(record, name)
    if not isinstance(value, str):
      raise _wrong(name, value, "a text")
  if not isinstance(record.task, str) or record.task not in TASKS:
    raise _wrong("task", record.task, f"one of {', '.join(TASKS)}")
  if not isinstance(record.image, bytes | np.ndarray):
    raise _wrong(
      "image", record.image, "the bytes of a picture file, or a uint8 array"
    )
  _check_answers(record.answers)
  if record.score is not None and not _is_finite(record.score):
    raise _wrong("score", record.score, "a finite number or None")
  number = record.annotators
  if not _is_number(number, numbers.Integral) or number < 0:
    raise _wrong("annotators", number, "an integer of at least 0")
  changes: dict[str, Any] = {}
  people = _as_tuple(record.people)
  if people is None or not all(isinstance(text, str) for text in people):
    raise _wrong("people", record.people, "a list of texts")
  if people is not record.people:
    changes["people"] = people
  if record.box is not None:
    box = _as_tuple(record.box)
    if box is None or len(box) != 4 or not all(map(_is_finite, box)):
      what = "four finite numbers x0, y0, x1, y1 in pixels"
      raise _wrong("box", record.box, what)
    if box is not record.box:
      changes["box"] = tuple(map(float, box))
  if record.objects is not None:
    objects = _as_tuple(record.objects)
    if objects is None or not all(isinstance(name, str) for name in objects):
      raise _wrong("objects", record.objects, "a list of texts or None")
    if objects is not record.objects:
      changes["objects"] = objects
  return dataclasses.replace(record, **changes) if changes else record


def _check_answers(answers: Any) -> None:
  if not isinstance(answers, Mapping):
    raise _wrong("answers", answers, "a mapping of answers to scores")
  for answer, score in answers.items():
    if not isinstance(answer, str):
      raise UserError(
        f'the field "answers" has the answer {quoted(answer)}; it must be'
        " a text"
      )
    if len(answer) > LONGEST_ANSWER:
      raise UserError(
        f"an answer has {len(answer):,} characters, the limit is"
        f" {LONGEST_ANSWER:,}: {quoted(answer)}"
      )
    # Score 0 is allowed for answers that are not the target.
    if not _is_finite(score) or not 0 <= score <= 1:
      raise UserError(
        f"the answer {quoted(answer)} has the score {quoted(score)};"
        " it must be above 0 and at most 1"
      )


def _as_tuple(values: Any) -> tuple[Any, ...] | None:
  """Returns ordered values as a tuple; None for other types."""
  if isinstance(values, tuple):
    return values
  if isinstance(values, list):
    return tuple(values)
  if isinstance(values, np.ndarray) and values.ndim == 1:
    return tuple(values.tolist())
  return None


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
  if isinstance(value, np.ndarray) and value.ndim == 0:
    value = value[()]
  return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
  try:
    return _is_number(value) and math.isfinite(value)
  except OverflowError:  # An integer that exceeds all floats.
    return False


def _wrong(name: str, value: Any, what: str) -> UserError:
  return UserError(f'the field "{name}" is {quoted(value)}; it must be {what}')
