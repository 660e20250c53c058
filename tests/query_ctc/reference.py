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
  total = 0.0
  visits = np.zeros((n, v))
  for path in itertools.product(range(v), repeat=n):
    labels = collapse(path, blank_id=blank_id, pad_id=-1, merge_repeats=True)
    if labels != list(target):
      continue
    p = np.exp(q[np.arange(n), path].sum())
    total += p
    visits[np.arange(n), path] += p
  if total == 0.0:
    nll, gradient = np.inf, np.zeros((n, v))
  else:
    nll, gradient = -np.log(total), temper * (softmax - visits / total)
  return Enumeration(nll, gradient, q.mean(), temper * (1 / v - softmax) / n)
