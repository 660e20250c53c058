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
  checkpoints take as long as the last one did; before the first one nothing
  is known of them, and they count as nothing. The first evaluation of a process
  also compiles, so until the second one the estimate is too long.
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
    self._evaluation = self._checkpoint = 0.0

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
    if checkpoint:
      count = self._saves(first, last)
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
    steps = self._steps
    # The last step is evaluated and saved whatever its number.
    evaluations = count_due(step, steps, self._eval_every)
    evaluations += bool(self._eval_every)
    saves = self._saves(step, steps) + 1
    return (
      (steps - step) * statistics.median(self._step_seconds)
      + (evaluations + self._final_evaluation) * self._evaluation
      + saves * self._checkpoint
    )

  def _saves(self, first: int, last: int) -> int:
    """Returns the steps of [first, last) that are saved."""
    periods = (self._eval_every, self._checkpoint_every)
    either = sum(count_due(first, last, every) for every in periods)
    return either - count_due(first, last, math.lcm(*periods))
