"""Decides which checkpoints of a run are kept.

The policies of Orbax are not used: `BestN` keeps checkpoints without a score
while there are few, and lets a NaN displace the best; they read scores from
metrics that Orbax stores at the save, whereas a score in a record can be set
later; and they give no reasons, which `narvl_jax.checkpoints list` prints.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Retention:
  """Numbers of checkpoints to keep.

  Attributes:
    last: number of newest checkpoints, at least 1.
    best: number of checkpoints with the highest scores, see `ranked`.
    every: steps divisible by this are kept; 0: none.
  """

  last: int
  best: int = 1
  every: int = 0

  def reasons(
    self, steps: Iterable[int], scores: Mapping[int, float | None]
  ) -> dict[int, list[str]]:
    """Returns why each step is kept; an empty list if it is not."""
    steps = sorted(steps)
    last = steps[-self.last :]
    best = ranked(steps, scores)[: self.best]
    reasons = {step: [] for step in steps}
    for step, found in reasons.items():
      if step in last:
        found.append("last")
      if step in best:
        found.append("best")
      if self.every and step % self.every == 0:
        found.append(f"every {self.every}")
    return reasons


def ranked(
  steps: Iterable[int], scores: Mapping[int, float | None]
) -> list[int]:
  """Returns the steps with a score, best first; later steps first if equal."""
  scored = []
  for step in steps:
    score = scores.get(step)
    if score is not None and not math.isnan(score):
      scored.append((score, step))
  return [step for _, step in sorted(scored, reverse=True)]
