"""Metrics of captions: exact match and token F1."""

import collections
import string

from narvl_jax.data.answer_text import normalize_answer
from narvl_jax.data.example import Record
from narvl_jax.evaluation.metric import MeanMetric

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


class CaptionMatch(MeanMetric):
  """Exact match and token F1; both heed letter case, not punctuation."""

  names = ("exact_match", "token_f1")

  def measure(
    self, example: Record, prediction: str
  ) -> dict[str, float] | None:
    """Returns the scores against the best matching reference."""
    references = [normalise(reference) for reference in example.answers]
    if not references:
      return None
    prediction = normalise(prediction)
    return {
      "exact_match": float(prediction in references),
      "token_f1": max(token_f1(prediction, x) for x in references),
    }
