"""Chooses the checkpoint to read: the best, the last, or a step."""

import os
from collections.abc import Callable
from typing import TypeVar

from narvl_jax.checkpointing.reading import RemovedCheckpoint
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError

_T = TypeVar("_T")
# Attempts; a training run saves a new checkpoint between two of them.
_ATTEMPTS = 20


def choose_step(checkpoints: Checkpoints, wanted: str | int) -> int:
  """Returns the step for "best", "last" or a number.

  "best" is the last one while no checkpoint has a score.

  Raises:
    UserError: the run has no such checkpoint.
  """
  steps = checkpoints.steps()
  if not steps:
    raise UserError(
      "this run has no checkpoint yet; train it first, or give another"
      " --workdir"
    )
  if wanted == "last":
    return steps[-1]
  if wanted == "best":
    best = checkpoints.best_step
    return steps[-1] if best is None else best
  try:
    number = int(wanted)
  except ValueError:
    number = -1
  if number not in steps:
    raise UserError(
      f'no checkpoint "{wanted}"; this run has'
      f" {', '.join(map(str, steps))}; valid are also best and last"
      " (--checkpoint)"
    )
  return number


def read_chosen(
  workdir: str | os.PathLike[str],
  wanted: str | int,
  read: Callable[[Checkpoints, int], _T],
) -> _T:
  """Returns `read(checkpoints, step)` of the chosen checkpoint.

  If a training run removes the checkpoint meanwhile, "best" and "last" are
  looked up again.

  Args:
    wanted: "best", "last" or a step, see `choose_step`.

  Raises:
    UserError: the run has no such checkpoint, or it was removed.
  """
  left = _ATTEMPTS if wanted in ("best", "last") else 1
  while True:
    left -= 1
    with Checkpoints(workdir) as checkpoints:
      step = choose_step(checkpoints, wanted)
      try:
        return read(checkpoints, step)
      except RemovedCheckpoint:
        if not left:
          raise
