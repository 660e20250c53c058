"""Metrics of captions: exact match, token F1, CIDEr, the figures of COCO."""

import abc
import collections
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from narvl_jax.data.answer_text import normalize_answer
from narvl_jax.data.example import Record
from narvl_jax.evaluation.metric import MeanMetric, Metric
from narvl_jax.metrics import bootstrap, captions, tokenizers
from narvl_jax.metrics.cider import DocumentFrequencies

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
  """Exact match and token F1; case counts, punctuation does not."""

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


class _CorpusFigures(Metric):
  """Figures of all captions together."""

  _last: tuple[Sequence[Any], list[captions.CaptionFigure]] = ([], [])

  @abc.abstractmethod
  def figures(
    self, predictions: list[str], references: list[list[str]]
  ) -> list[captions.CaptionFigure]:
    """Computes the figures."""

  def measure(self, example: Record, prediction: str) -> list[Any] | None:
    """Returns the caption and its references."""
    if not example.answers:
      return None
    return [prediction, list(example.people or example.answers)]

  def reduce(self, measured: Sequence[Any]) -> dict[str, float]:
    """Returns the figures that are available."""
    found = self._figures(measured)
    return {x.name: x.value for x in found if x.value is not None}

  def statistics(
    self, measured: Sequence[Any]
  ) -> dict[str, tuple[np.ndarray, bootstrap.Figure]]:
    """Returns those of the figures that are available."""
    found = self._figures(measured)
    return {
      x.name: (x.statistics, x.figure) for x in found if x.value is not None
    }

  def _frequencies(self, tokenizer: str) -> DocumentFrequencies | None:
    """Returns the given frequencies if they count words of a tokenizer."""
    given = self.options.frequencies
    return given if given and given.tokenizer in ("", tokenizer) else None

  def _figures(self, measured: Sequence[Any]) -> list[captions.CaptionFigure]:
    # Value, intervals and data set are mostly of the same examples.
    if self._last[0] != measured:
      predictions, references = zip(*measured, strict=True)
      found = self.figures([*predictions], [*references])
      self._last = measured, found
    return self._last[1]


class SimpleCider(_CorpusFigures):
  """CIDEr-D, from 0 to 10, of words that need no Java."""

  names = ("cider@simple",)

  def figures(
    self, predictions: list[str], references: list[list[str]]
  ) -> list[captions.CaptionFigure]:
    """Computes the figure."""
    frequencies = self._frequencies("simple")
    return [captions.simple_cider(predictions, references, frequencies)]


class CocoFigures(_CorpusFigures):
  """BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE; most of them need Java."""

  names = ()
  of_groups = False

  def figures(
    self, predictions: list[str], references: list[list[str]]
  ) -> list[captions.CaptionFigure]:
    """Computes the figures."""
    frequencies = self._frequencies(
      "simple" if tokenizers.why_no_ptb() else "ptb"
    )
    return captions.coco_figures(predictions, references, frequencies)

  def details(self, measured: Sequence[Any]) -> dict[str, Any]:
    """Returns why figures are unavailable: {"unavailable": name -> reason}."""
    found = {x.name: x.reason for x in self._figures(measured) if x.reason}
    return {"unavailable": found} if found else {}
