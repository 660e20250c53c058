"""Calibration of probabilities: temperature, calibration error, abstaining.

Guo et al. 2017, arXiv 1706.04599: a model is calibrated if a share p of
the answers with probability p is right.
"""

import dataclasses
from typing import Any

import numpy as np

_BINS = 15
# Outside of this range probabilities carry no information.
_LOWEST, _HIGHEST = 0.05, 20.0
_SMALLEST = 1e-12
# 95 % quantile of chi-squared with one degree of freedom.
_SIGNIFICANT = 3.84
_SIMULATIONS = 200


@dataclasses.dataclass(frozen=True)
class Reliability:
  """Accuracy against confidence in bins of equal width.

  Attributes:
    error: expected calibration error, in [0, 1].
    confidence: mean probability of each bin, [bins]; NaN if empty.
    accuracy: share of right answers in each bin, [bins]; NaN if empty.
    count: examples of each bin, [bins].
  """

  error: float
  confidence: np.ndarray
  accuracy: np.ndarray
  count: np.ndarray


def reliability(
  probabilities: Any, correct: Any, bins: int = _BINS
) -> Reliability:
  """Returns the reliability diagram and the expected calibration error.

  Args:
    probabilities: [examples] in [0, 1].
    correct: [examples], share of correctness in [0, 1].
    bins: number of bins of equal width over [0, 1].
  """
  probabilities = np.asarray(probabilities, np.float64)
  correct = np.asarray(correct, np.float64)
  index = np.minimum((probabilities * bins).astype(int), bins - 1)
  count = np.bincount(index, minlength=bins)
  with np.errstate(invalid="ignore"):
    confidence = np.bincount(index, probabilities, bins) / count
    accuracy = np.bincount(index, correct, bins) / count
  gap = np.where(count > 0, np.abs(confidence - accuracy), 0)
  error = float(np.sum(gap * count) / max(count.sum(), 1))
  return Reliability(error, confidence, accuracy, count)


def apply_temperature(probabilities: Any, temperature: float) -> np.ndarray:
  """Returns sigmoid(logit(p) / temperature), float64 [examples].

  The probability of an answer is compared with that of all other answers, so
  one number per task suffices (Platt scaling without an offset).
  """
  p = np.clip(np.asarray(probabilities, np.float64), _SMALLEST, 1 - _SMALLEST)
  return 1 / (1 + np.exp(-(np.log(p) - np.log1p(-p)) / temperature))


def fit_temperature(probabilities: Any, correct: Any) -> float:
  """Returns the temperature of the highest likelihood.

  The negative log-likelihood is convex in 1 / temperature, so a bisection of
  its derivative finds the minimum.

  Args:
    probabilities: [examples] in [0, 1], of answers on a validation split.
    correct: [examples], share of correctness in [0, 1].

  Returns:
    A number in [0.05, 20]; 1 without examples.
  """
  p = np.clip(np.asarray(probabilities, np.float64), _SMALLEST, 1 - _SMALLEST)
  correct = np.asarray(correct, np.float64)
  if not len(p):
    return 1.0
  logits = np.log(p) - np.log1p(-p)

  def slope(scale: float) -> float:
    return float(np.sum((1 / (1 + np.exp(-logits * scale)) - correct) * logits))

  low, high = 1 / _HIGHEST, 1 / _LOWEST
  if slope(low) >= 0:
    return _HIGHEST
  if slope(high) <= 0:
    return _LOWEST
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (low, middle) if slope(middle) > 0 else (middle, high)
  return 2 / (low + high)


def is_better(probabilities: Any, correct: Any, temperature: float) -> bool:
  """Returns whether a fitted temperature is better than 1 beyond noise.

  The test is that of the ratio of likelihoods on the fitted examples, at the
  level of 5 % for independent ones.

  Args:
    probabilities: [examples] in [0, 1].
    correct: [examples] in [0, 1].
    temperature: maximises the likelihood.
  """
  correct = np.asarray(correct, np.float64)

  def likelihood(temperature: float) -> float:
    p = apply_temperature(probabilities, temperature)
    p = np.clip(p, _SMALLEST, 1 - _SMALLEST)
    return float(np.sum(correct * np.log(p) + (1 - correct) * np.log1p(-p)))

  return 2 * (likelihood(temperature) - likelihood(1.0)) > _SIGNIFICANT


def chance_error(probabilities: Any) -> float:
  """Returns the mean calibration error of perfectly calibrated probabilities.

  It is not 0, because the share of right answers in a bin of finitely many
  examples varies. Simulated with seed 0.
  """
  p = np.asarray(probabilities, np.float64)
  rng = np.random.default_rng(0)
  errors = [
    reliability(p, rng.random(len(p)) < p).error for _ in range(_SIMULATIONS)
  ]
  return float(np.mean(errors))


@dataclasses.dataclass(frozen=True)
class Abstention:
  """The effect of a threshold on the probability.

  Attributes:
    threshold: answers below it are withheld.
    coverage: share of the examples that are answered.
    accuracy: accuracy of the answered examples.
  """

  threshold: float
  coverage: float
  accuracy: float


def abstention(
  probabilities: Any, correct: Any, accuracy: float
) -> Abstention | None:
  """Returns the lowest threshold at which answers reach an accuracy.

  Args:
    probabilities: [examples] in [0, 1].
    correct: [examples], share of correctness in [0, 1].
    accuracy: target accuracy, in [0, 1].

  Returns:
    The threshold with the largest coverage; None if none reaches the accuracy.
  """
  probabilities = np.asarray(probabilities, np.float64)
  order = np.argsort(-probabilities, kind="stable")
  sorted_p = probabilities[order]
  reached = np.cumsum(np.asarray(correct, np.float64)[order])
  reached /= np.arange(1, len(order) + 1)
  # Answers of equal probability are kept or withheld together.
  last = np.append(sorted_p[1:] != sorted_p[:-1], True)[: len(order)]
  good = np.flatnonzero((reached >= accuracy) & last)
  if not len(good):
    return None
  best = int(good[-1])
  return Abstention(
    float(sorted_p[best]), (best + 1) / len(order), float(reached[best])
  )
