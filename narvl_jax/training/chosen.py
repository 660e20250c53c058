"""Reading the best or the last checkpoint, also of a run that is training."""

import os
from collections.abc import Callable
from typing import TypeVar

from narvl_jax.training.checkpoints import Checkpoints, choose_step
from narvl_jax.training.stored_checkpoints import RemovedCheckpoint

_T = TypeVar("_T")
# Each time a run has saved a checkpoint meanwhile, which takes it a while.
_TRIES = 20


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
