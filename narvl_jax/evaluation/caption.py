"""Scores of captions: exact match and token F1."""

import collections
import string

from narvl_jax.data.answer_text import normalize_answer
from narvl_jax.data.example import Record

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
  """Normalises white space and characters, and deletes ASCII punctuation."""
  text = normalize_answer(text).translate(_NO_PUNCTUATION)
  return " ".join(text.split())


def token_f1(prediction: str, reference: str) -> float:
  """Returns the F1 of two bags of words, in [0, 1]; 1 if both are empty."""
  predicted, expected = prediction.split(), reference.split()
  if not predicted or not expected:
    return float(predicted == expected)
  counts = collections.Counter(predicted) & collections.Counter(expected)
  overlap = sum(counts.values())
  return 2 * overlap / (len(predicted) + len(expected))


def score(prediction: str, record: Record) -> dict[str, float] | None:
  """Scores a caption against its best matching reference.

  Punctuation and spacing count on neither side; letter case does.

  Args:
    prediction: the caption.
    record: every key of `answers` is a valid reference.

  Returns:
    exact_match and token_f1, or None if there is no reference.
  """
  references = [normalise(reference) for reference in record.answers]
  if not references:
    return None
  prediction = normalise(prediction)
  return {
    "exact_match": float(prediction in references),
    "token_f1": max(token_f1(prediction, x) for x in references),
  }
