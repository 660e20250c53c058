"""The probability that a predicted box overlaps the true one well."""

from typing import Any

import numpy as np

# Pairs of bins with less probability are left out.
_NEGLIGIBLE = 1e-7


def probability_of_overlap(
  bins: np.ndarray, probs: np.ndarray, box: Any
) -> float:
  """Returns the probability of an intersection over union of at least 0.5.

  The sum is over all boxes whose coordinates are among the given bins. The four
  coordinates count as independent. Left-out bins and pairs of bins (of less
  than 1e-7) make the result too low by at most their probability.

  Args:
    bins: int [4, K], of x0, y0, x1, y1, counted from 0.
    probs: [4, K] probabilities of the bins.
    box: four bins; without area, the result is 0.
  """
  probs = np.asarray(probs, np.float64)
  x0, y0, x1, y1 = box
  if x1 <= x0 or y1 <= y0:
    return 0.0
  common_x, width, mass_x = _sides(bins[::2], probs[::2], x0, x1)
  common_y, height, mass_y = _sides(bins[1::2], probs[1::2], y0, y1)
  # IoU >= 1/2 means 2 I >= A + B - I, for boxes of the areas A and B.
  both = np.outer(width, height) + (x1 - x0) * (y1 - y0)
  good = 3 * np.outer(common_x, common_y) >= both
  return float(min(mass_x @ (good @ mass_y), 1.0))


def _sides(
  bins: np.ndarray, probs: np.ndarray, low: int, high: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns overlap with [low, high], length and probability of intervals."""
  starts, ends = np.asarray(bins, np.int64)
  common = np.minimum(ends, high) - np.maximum(starts, low)[:, None]
  length = ends - starts[:, None]
  mass = np.outer(*probs)
  kept = (common > 0) & (mass > _NEGLIGIBLE)
  return common[kept], length[kept], mass[kept]
