"""Estimates the time left of a run from its recent speed and remaining work."""

import collections
import dataclasses
import math
import statistics

# Intervals between reports whose median is the speed.
_RECENT = 10


def count_due(first: int, last: int, every: int) -> int:
  """Returns the multiples of `every` in [first, last); 0 counts none."""
  if not every:
    return 0
  return max((last - 1) // every - (max(first, 1) - 1) // every, 0)


@dataclasses.dataclass
class Eta:
  """Estimates the seconds until a run ends.

  The speed of training is the median of the last intervals, so a single slow
  one does not count. An evaluation or checkpoint is expected to take as long as
  the last one; before the first one it counts as 0 s, and the estimate is a
  lower bound. The first evaluation also compiles, so until the second one the
  estimate is an upper bound.

  Attributes:
    eval_every: steps between evaluations; 0 for none.
    checkpoint_every: steps between checkpoints, in addition to those of the
      evaluations; 0 for none.
    final_evaluation: number of examples of the final evaluation, relative to
      one before it.
  """

  steps: int
  eval_every: int
  checkpoint_every: int
  final_evaluation: float = 0.0

  def __post_init__(self) -> None:
    self._step_seconds = collections.deque[float](maxlen=_RECENT)
    # Seconds of the last one; None before the first.
    self._evaluation: float | None = None
    self._evaluations = 0
    self._checkpoint: float | None = None

  def add(
    self,
    first: int,
    last: int,
    *,
    training: float,
    evaluation: float,
    checkpoint: float,
  ) -> None:
    """Records an interval between two reports.

    An evaluation or checkpoint of step `first` belongs to the interval, one of
    step `last` to the next.

    Args:
      first: step of the previous report.
      last: step of this one.
      training: seconds of updates, including the wait for data.
      evaluation: seconds of evaluations.
      checkpoint: seconds that the loop waited for checkpoints.
    """
    if last > first:
      self._step_seconds.append(training / (last - first))
    if evaluation:
      count = count_due(first, last, self.eval_every)
      self._evaluation = evaluation / max(count, 1)
      self._evaluations += max(count, 1)
    count = self._saves(first, last)
    if checkpoint or count:
      self._checkpoint = checkpoint / max(count, 1)

  def seconds_left(self, step: int) -> float | None:
    """Returns the seconds from update `step` to the end of the run.

    An evaluation or save that is due at `step` is included. None before the
    first interval.
    """
    if not self._step_seconds:
      return None
    evaluations, saves = self._due(step)
    return (
      (self.steps - step) * statistics.median(self._step_seconds)
      + evaluations * (self._evaluation or 0.0)
      + saves * (self._checkpoint or 0.0)
    )

  def is_lower_bound(self, step: int) -> bool:
    """Returns whether some work due from `step` on was never measured."""
    evaluations, saves = self._due(step)
    return bool(
      (evaluations and self._evaluation is None)
      or (saves and self._checkpoint is None)
    )

  def is_upper_bound(self, step: int) -> bool:
    """Returns whether evaluations are due and only the first was measured."""
    evaluations, _ = self._due(step)
    return bool(evaluations) and self._evaluations == 1

  def _due(self, step: int) -> tuple[float, int]:
    """Returns the number of evaluations and saves still due."""
    # The last step is always evaluated and saved.
    evaluations = count_due(step, self.steps, self.eval_every)
    evaluations += bool(self.eval_every)
    saves = self._saves(step, self.steps) + 1
    return evaluations + self.final_evaluation, saves

  def _saves(self, first: int, last: int) -> int:
    """Returns the number of saves in [first, last)."""
    periods = (self.eval_every, self.checkpoint_every)
    either = sum(count_due(first, last, every) for every in periods)
    return either - count_due(first, last, math.lcm(*periods))
