"""Beam search in plain Python, one sequence at a time, from the rules."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np


class Hypothesis(NamedTuple):
  ids: tuple[int, ...]
  score: float
  log_prob: float


def allowed_next(
  answers: Collection[tuple[int, ...]] | None,
  said: tuple[int, ...],
  size: int,
  eos: int,
) -> set[int]:
  """Tokens that may follow if the result must be one of the answers."""
  if answers is None:
    return set(range(size))
  n = len(said)
  longer = {a[n] for a in answers if len(a) > n and a[:n] == said}
  return longer | ({eos} if said in answers else set())


def log_softmax(logits: np.ndarray, allowed: Collection[int]) -> np.ndarray:
  """Natural logarithms, float32; -inf for tokens that are not allowed."""
  out = np.full(len(logits), -np.inf, np.float32)
  ids = sorted(allowed)
  if ids:
    kept = logits[ids].astype(np.float32)
    shifted = kept - kept.max()
    out[ids] = shifted - np.log(np.exp(shifted).sum())
  return out


def repeats(history: Sequence[int], n: int) -> bool:
  """Whether the last n tokens occurred before."""
  ngrams = [tuple(history[i : i + n]) for i in range(len(history) - n + 1)]
  return bool(n) and bool(ngrams) and ngrams[-1] in ngrams[:-1]


def slow_beam_search(
  logits_of: Callable[[tuple[int, ...]], np.ndarray],
  first: int,
  *,
  eos: int,
  pad: int,
  beam: int,
  min_length: int,
  max_length: int,
  ngram: int = 0,
  normalize: bool = True,
  answers: Collection[tuple[int, ...]] | None = None,
  forbidden: Collection[int] = (),
) -> tuple[list[Hypothesis], int]:
  """Returns the finished hypotheses, best first, and the number of steps.

  `logits_of` gets the tokens after `first`.
  """
  live: list[tuple[tuple[int, ...], np.float32]] = [((), np.float32(0))]
  finished: list[Hypothesis] = []
  steps = 0
  for length in range(max_length + 1):
    steps += 1
    candidates = []
    for rank, (said, total) in enumerate(live):
      logits = logits_of(said)
      allowed = allowed_next(answers, said, len(logits), eos) - set(forbidden)
      for token, log_prob in enumerate(log_softmax(logits, allowed)):
        if token == pad or log_prob == -np.inf:
          continue
        if token == eos and length < min_length:
          continue
        if token != eos and length == max_length:
          continue
        if repeats([first, *said, token], ngram):
          continue
        candidates.append((-np.float32(total + log_prob), rank, token))
    candidates = sorted(candidates)[: 2 * beam]
    going_on = []
    for place, (cost, rank, token) in enumerate(candidates):
      said = live[rank][0]
      if token != eos:
        going_on.append(((*said, token), -cost))
      elif place < beam and len(finished) < beam:
        score = -cost / np.float32(length + 1) if normalize else -cost
        finished.append(Hypothesis(said, score, -cost))
    live = going_on[:beam]
    if len(finished) == beam or not live:
      break
  return sorted(finished, key=lambda h: -h.score), steps
