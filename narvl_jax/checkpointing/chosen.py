"""Which checkpoint is read: the best, the last, or a step."""

import os
from collections.abc import Callable
from typing import TypeVar

from narvl_jax.checkpointing.reading import RemovedCheckpoint
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError

_T = TypeVar("_T")
# Each time a run has saved a checkpoint meanwhile, which takes it a while.
_TRIES = 20


def choose_step(checkpoints: Checkpoints, wanted: str | int) -> int:
  """Returns the step that "best", "last" or a number stands for.

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
      f" {', '.join(map(str, steps))}, or say best or last (--checkpoint)"
    )
  return number


def read_chosen(
  workdir: str | os.PathLike[str],
  wanted: str | int,
  read: Callable[[Checkpoints, int], _T],
) -> _T:
  """Returns what `read` does of the checkpoint that a name stands for.

  A run that is training may remove it in the middle; then that which "best" or
  "last" stands for by now is read.

  Args:
    workdir: the run folder.
    wanted: "best", "last" or a step, see `choose_step`.
    read: given the checkpoints of the run and the step.

  Raises:
    UserError: the run has no such checkpoint, or no longer.
  """
  left = _TRIES if wanted in ("best", "last") else 1
  while True:
    left -= 1
    with Checkpoints(workdir) as checkpoints:
      step = choose_step(checkpoints, wanted)
      try:
        return read(checkpoints, step)
      except RemovedCheckpoint:
        if not left:
          raise
