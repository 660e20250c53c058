"""CTC and its decoding by the definition, in plain Python and float64."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass
class Enumeration:
  """nll [] (inf without a path), its gradient [N, V], mean log-prob []."""

  nll: float
  gradient: np.ndarray
  mean_log_prob: float
  mean_gradient: np.ndarray


def collapse(
  ids: Sequence[int], *, blank_id: int, pad_id: int, merge_repeats: bool
) -> list[int]:
  if merge_repeats:
    ids = [key for key, _ in itertools.groupby(ids)]
  return [int(x) for x in ids if x not in (blank_id, pad_id)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
  z = np.asarray(logits, np.float64)
  z = z - z.max(axis=-1, keepdims=True)
  return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def log_sum(scores: Sequence[float]) -> float:
  """Logarithm of the sum of exponentials, of any magnitude."""
  largest = max(scores, default=-np.inf)
  if largest == -np.inf:
    return -np.inf
  return float(largest + np.log(np.sum(np.exp(np.array(scores) - largest))))


def enumerate_paths(
  logits: np.ndarray,
  target: Sequence[int],
  *,
  blank_id: int,
  temper: float = 1.0,
) -> Enumeration:
  """Sums over all V**N paths; logits [N, V]."""
  n, v = logits.shape
  log_probs = log_softmax(logits)
  softmax = np.exp(log_probs)
  q = temper * log_probs
  paths = [
    path
    for path in itertools.product(range(v), repeat=n)
    if collapse(path, blank_id=blank_id, pad_id=-1, merge_repeats=True)
    == list(target)
  ]
  scores = [float(q[np.arange(n), path].sum()) for path in paths]
  total = log_sum(scores)
  if total == -np.inf:
    nll, gradient = np.inf, np.zeros((n, v))
  else:
    # Not of the total, from which large scores round the count of paths away.
    weights = np.exp(np.array(scores) - max(scores))
    weights /= weights.sum()
    visits = np.zeros((n, v))
    for path, weight in zip(paths, weights, strict=True):
      visits[np.arange(n), path] += weight
    nll, gradient = -total, temper * (softmax - visits)
  return Enumeration(nll, gradient, q.mean(), temper * (1 / v - softmax) / n)
