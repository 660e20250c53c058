"""Plain Python over lists and dicts, to compare searches with."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from tests.query_ctc.reference import log_sum

Prefix = tuple[int, ...]
# Whether a prefix (True: a whole answer) is allowed with so many queries left.
Allowed = Callable[[Prefix, int, bool], bool]


def collapse(path: Sequence[int], blank: int, merge: bool) -> Prefix:
  """Returns the labels of an alignment."""
  if merge:
    path = [label for label, _ in itertools.groupby(path)]
  return tuple(label for label in path if label != blank)


def all_answers(
  log_probs: np.ndarray, blank: int, merge: bool, pad: int = -1
) -> dict[Prefix, float]:
  """Sums over all alignments of log_probs [N, V], one by one."""
  n, v = log_probs.shape
  scores: dict[Prefix, list[float]] = defaultdict(list)
  for path in itertools.product(range(v), repeat=n):
    if pad not in path:
      score = sum(float(log_probs[i, c]) for i, c in enumerate(path))
      scores[collapse(path, blank, merge)].append(score)
  totals = {answer: log_sum(terms) for answer, terms in scores.items()}
  return {answer: x for answer, x in totals.items() if x > -math.inf}


def best_alignment(
  log_probs: np.ndarray, blank: int, merge: bool, answers: Sequence[Prefix]
) -> tuple[Prefix, float]:
  """Returns the answer of the best alignment among some, and its score."""
  n, v = log_probs.shape
  allowed = set(answers)
  best = ((), -math.inf)
  for path in itertools.product(range(v), repeat=n):
    answer = collapse(path, blank, merge)
    score = float(sum(log_probs[i, c] for i, c in enumerate(path)))
    if answer in allowed and score > best[1]:
      best = answer, score
  return best


def queries_for(labels: Prefix, merge: bool) -> int:
  """Returns how many queries these labels need."""
  repeats = sum(a == b for a, b in itertools.pairwise(labels))
  return len(labels) + merge * repeats


def completes(answers: Sequence[Prefix], merge: bool) -> Allowed:
  """Returns the rule of a constraint that allows these answers."""

  def allowed(prefix: Prefix, left: int, whole: bool) -> bool:
    """Whether some answer has this prefix and its rest fits the queries."""
    if whole:
      return prefix in answers
    rests = [a[len(prefix) :] for a in answers if a[: len(prefix)] == prefix]
    return any(queries_for(rest, merge) <= left for rest in rests)

  return allowed


def completes_after_label(answers: Sequence[Prefix], merge: bool) -> Allowed:
  """Like `completes`, for prefixes whose last query emitted the last label."""

  def allowed(prefix: Prefix, left: int, whole: bool) -> bool:
    del whole
    rests = [a[len(prefix) :] for a in answers if a[: len(prefix)] == prefix]
    return any(
      queries_for(rest, merge)
      + (merge and len(rest) > 0 and rest[0] == prefix[-1])
      <= left
      for rest in rests
    )

  return allowed


def prefix_beam_search(
  log_probs: np.ndarray,
  *,
  blank: int,
  pad: int,
  beam_size: int,
  merge: bool = True,
  answers: Sequence[Prefix] | None = None,
  candidates: int | None = None,
) -> list[tuple[Prefix, float]]:
  """Returns the prefixes of the last beam, best first, with their scores."""
  n, v = log_probs.shape
  labels = [c for c in range(v) if c not in (blank, pad)]
  beam: dict[Prefix, tuple[float, float]] = {(): (1.0, 0.0)}
  for query in range(n):
    p = np.exp(log_probs[query].astype(np.float64))
    top = sorted(labels, key=lambda c: -p[c])[:candidates]
    following: dict[Prefix, list[float]] = defaultdict(lambda: [0.0, 0.0])
    fresh = set()
    for prefix, (in_blank, in_label) in beam.items():
      following[prefix][0] += (in_blank + in_label) * p[blank]
      if merge and prefix:
        following[prefix][1] += in_label * p[prefix[-1]]
      for c in labels:
        longer = (*prefix, c)
        if longer not in beam:
          if candidates is not None and c not in top:
            continue
          fresh.add(longer)
        same = merge and prefix[-1:] == (c,)
        mass = in_blank if same else in_blank + in_label
        following[longer][1] += mass * p[c]
    if answers is not None:
      left = n - 1 - query
      stays = completes(answers, merge)
      begins = completes_after_label(answers, merge)
      following = {
        prefix: masses
        for prefix, masses in following.items()
        if (begins if prefix in fresh else stays)(prefix, left, False)
      }
    ranked = sorted(following, key=lambda prefix: -sum(following[prefix]))
    beam = {
      prefix: (following[prefix][0], following[prefix][1])
      for prefix in ranked[:beam_size]
      if sum(following[prefix]) > 0
    }
  return [
    (prefix, math.log(sum(masses)))
    for prefix, masses in beam.items()
    if answers is None or prefix in answers
  ]
