"""How long a run has left, from its recent speed and what is still due."""

import collections
import math
import statistics

# Intervals between two reports whose median is the speed of a run.
_RECENT = 10


def count_due(first: int, last: int, every: int) -> int:
  """Returns the multiples of `every` in [first, last); 0 counts none."""
  if not every:
    return 0
  return max((last - 1) // every - (max(first, 1) - 1) // every, 0)


class Eta:
  """Estimates the seconds until a run is done.

  Training takes the median of the last intervals, so that one slow interval
  (the first one, a machine that was paused) does not count. Evaluations and
  checkpoints take as long as the last one did. Before the first one they count
  as nothing, so the estimate is a lower bound (`is_lower_bound`). The first
  evaluation of a process also compiles, so until the second one the estimate is
  too long.
  """

  def __init__(
    self,
    steps: int,
    *,
    eval_every: int,
    checkpoint_every: int,
    final_evaluation: float = 0.0,
  ) -> None:
    """Takes what a run will do.

    Args:
      steps: updates of the run.
      eval_every: steps between two evaluations; 0: none.
      checkpoint_every: steps between two checkpoints besides those of the
        evaluations; 0: none.
      final_evaluation: examples of the evaluation after the last step,
        relative to those of the ones before it.
    """
    self._steps = steps
    self._final_evaluation = final_evaluation
    self._eval_every = eval_every
    self._checkpoint_every = checkpoint_every
    self._step_seconds: collections.deque[float] = collections.deque(
      maxlen=_RECENT
    )
    # Seconds of the last one; None before the first one.
    self._evaluation: float | None = None
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
    """Notes an interval between two reports.

    An evaluation or a checkpoint of step `first` lies within the interval,
    one of step `last` in the next one.

    Args:
      first: step of the report before.
      last: step of this one.
      training: seconds that the updates took, the wait for data included.
      evaluation: seconds spent in evaluations.
      checkpoint: seconds that the loop waited for checkpoints.
    """
    if last > first:
      self._step_seconds.append(training / (last - first))
    if evaluation:
      count = count_due(first, last, self._eval_every)
      self._evaluation = evaluation / max(count, 1)
    count = self._saves(first, last)
    if checkpoint or count:
      self._checkpoint = checkpoint / max(count, 1)

  def seconds_left(self, step: int) -> float | None:
    """Returns the seconds from the end of an update to the end of the run.

    Args:
      step: of the update; what is due right after it is still to be done.

    Returns:
      The estimate; None before the first interval.
    """
    if not self._step_seconds:
      return None
    evaluations, saves = self._due(step)
    return (
      (self._steps - step) * statistics.median(self._step_seconds)
      + evaluations * (self._evaluation or 0.0)
      + saves * (self._checkpoint or 0.0)
    )

  def is_lower_bound(self, step: int) -> bool:
    """Returns whether something is due that was not measured yet.

    Args:
      step: see `seconds_left`.
    """
    evaluations, saves = self._due(step)
    return bool(
      (evaluations and self._evaluation is None)
      or (saves and self._checkpoint is None)
    )

  def _due(self, step: int) -> tuple[float, int]:
    """Returns the evaluations and the saves that are still due."""
    # The last step is evaluated and saved whatever its number.
    evaluations = count_due(step, self._steps, self._eval_every)
    evaluations += bool(self._eval_every)
    saves = self._saves(step, self._steps) + 1
    return evaluations + self._final_evaluation, saves

  def _saves(self, first: int, last: int) -> int:
    """Returns the steps of [first, last) that are saved."""
    periods = (self._eval_every, self._checkpoint_every)
    either = sum(count_due(first, last, every) for every in periods)
    return either - count_due(first, last, math.lcm(*periods))
