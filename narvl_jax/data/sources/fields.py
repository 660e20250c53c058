"""Checked fields of a user's files: scores, labels, boxes, captions."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from narvl_jax.data.answer_text import annotator_scores, normalize_answer
from narvl_jax.data.example import Box
from narvl_jax.data.record_checks import quoted as quoted
from narvl_jax.data.tasks.entailment import ANSWER_OF_LABEL, ANSWERS
from narvl_jax.errors import UserError, did_you_mean


def scored_answers(pairs: Iterable[tuple[str, Any]]) -> dict[str, float]:
  """Returns normalised answer -> score, the highest of equal answers.

  Raises:
    UserError: an answer is empty or a score is not in (0, 1].
  """
  answers: dict[str, float] = {}
  for answer, score in pairs:
    if not isinstance(answer, str):
      raise UserError(
        f"the answer {quoted(answer)} is not a text; put it in quotes"
      )
    text = normalize_answer(answer)
    if not text:
      raise UserError(
        f"an answer is empty: {quoted(answer)} with score {quoted(score)}"
      )
    try:
      if isinstance(score, bool):
        raise TypeError
      value = float(score)
    except (TypeError, ValueError, OverflowError) as e:
      raise UserError(
        f"the score of the answer {quoted(answer)} is {quoted(score)}; it must"
        " be a number above 0, at most 1"
      ) from e
    if not 0 < value <= 1:
      raise UserError(
        f"the score of the answer {quoted(answer)} is {score}; it must be above"
        " 0, at most 1"
      )
    answers[text] = max(value, answers.get(text, 0.0))
  return answers


def listed_answers(answers: Sequence[Any]) -> dict[str, Any]:
  """Returns `answers`, `annotators` and `people` for a list of answers.

  A list with repeats has one answer of each annotator and is scored as such. In
  a list without repeats every answer has score 1.

  Raises:
    UserError: an answer is not a text, or one is empty in a list without
      repeats.
  """
  texts = [normalize_answer(x) for x in answers if isinstance(x, str)]
  given = [text for text in texts if text]
  if len(texts) < len(answers) or len(set(given)) == len(given):
    return {"answers": scored_answers((answer, 1) for answer in answers)}
  return {
    "answers": annotator_scores(texts),
    "annotators": len(texts),
    "people": tuple(answers),
  }


def captions(references: Iterable[Any]) -> dict[str, float]:
  """Returns every different caption with score 1.

  Raises:
    UserError: a caption is not a text, or all are empty.
  """
  given = list(references)
  if not all(isinstance(caption, str) for caption in given):
    raise UserError(f"the captions {quoted(given)} must be texts")
  kept = [text for caption in given if (text := normalize_answer(caption))]
  if not kept:
    raise UserError("the caption is empty")
  return dict.fromkeys(kept, 1.0)


def entailment_answer(label: str) -> dict[str, float]:
  """Returns "yes", "no" or "maybe" with score 1.

  Args:
    label: one of these, or entailment, contradiction or neutral.

  Raises:
    UserError: the label is unknown.
  """
  label = normalize_answer(label)
  answer = ANSWER_OF_LABEL.get(label, label)
  if answer not in ANSWERS:
    raise UserError(
      f'the label "{label}" is unknown.'
      f"{did_you_mean(label, [*ANSWER_OF_LABEL, *ANSWERS])}"
    )
  return {answer: 1.0}


def pixel_box(values: Sequence[Any]) -> Box:
  """Returns x0, y0, x1, y1 in pixels; they may lie outside the picture.

  Raises:
    UserError: these are not four finite numbers, or the box has no area.
  """
  try:
    if isinstance(values, str | bytes | Mapping | Set) or any(
      isinstance(v, bool) for v in values
    ):
      raise TypeError
    x0, y0, x1, y1 = (float(value) for value in values)
  except (TypeError, ValueError, OverflowError) as e:
    raise UserError(
      f"the box is {quoted(values)}; it must be four numbers x0, y0, x1, y1 in"
      " pixels"
    ) from e
  if not all(math.isfinite(c) for c in (x0, y0, x1, y1)):
    raise UserError(
      f"the box {quoted(values)} contains a number that is not finite"
    )
  if x1 <= x0 or y1 <= y0:
    raise UserError(
      f"the box {quoted(values)} has no area; it must be x0, y0, x1, y1 with x0"
      " < x1 and y0 < y1 (not x, y, width, height)"
    )
  return x0, y0, x1, y1
