"""Which checkpoints of a run are kept, and why."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Retention:
  """How many checkpoints are kept.

  Attributes:
    last: of the newest ones, at least 1.
    best: of those with the highest scores; one without a score is never best,
      and of two with the same score the later one is better.
    every: those of each step that this divides; 0: none.
  """

  last: int
  best: int = 1
  every: int = 0

  def reasons(
    self, steps: Iterable[int], scores: Mapping[int, float | None]
  ) -> dict[int, list[str]]:
    """Returns why each step is kept; nothing for those that are not.

    Args:
      steps: that there are.
      scores: of those that have one.
    """
    steps = sorted(steps)
    last = steps[-self.last :]
    best = ranked(steps, scores)[: self.best]
    return {
      step: [
        reason
        for reason, holds in (
          ("last", step in last),
          ("best", step in best),
          (f"every {self.every}", self.every and step % self.every == 0),
        )
        if holds
      ]
      for step in steps
    }


def ranked(
  steps: Iterable[int], scores: Mapping[int, float | None]
) -> list[int]:
  """Returns the steps that have a score, the best one first."""
  scored = []
  for step in steps:
    score = scores.get(step)
    if score is not None and not math.isnan(score):
      scored.append((score, step))
  return [step for _, step in sorted(scored, reverse=True)]


@dataclasses.dataclass
class Policy:
  """A `Retention` as Orbax asks for it.

  Attributes:
    retention: what is kept.
    scores: returns those of all steps.
  """

  retention: Retention
  scores: Callable[[], Mapping[int, float | None]]

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Returns which checkpoints stay."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    reasons = self.retention.reasons(steps, self.scores())
    return [bool(reasons[step]) for step in steps]
