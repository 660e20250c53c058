"""How a run begins: its folder, and the state of the first step."""

import pathlib
from typing import Any

import jax

from narvl_jax.errors import UserError
from narvl_jax.experiment import Experiment
from narvl_jax.parallel import distributed
from narvl_jax.training import workdir as workdir_lib
from narvl_jax.training.announce import Announcer
from narvl_jax.training.checkpoints import Checkpoints, restore_target
from narvl_jax.training.init_from import init_from
from narvl_jax.training.integrity import DamagedCheckpoint
from narvl_jax.training.setup import Setup
from narvl_jax.training.train_state import TrainState


def write_run(
  experiment: Experiment,
  setup: Setup,
  workdir: pathlib.Path,
  resumes: bool,
) -> None:
  """Has the first host write what makes a folder the folder of a run."""
  # Each has looked for a run in it before there is one.
  distributed.barrier("run folder checked")
  if distributed.is_first():
    if not resumes:
      experiment.save(workdir)
    workdir_lib.write_sharding(workdir, setup.sharding_table())
  distributed.barrier("run folder written")
  host = distributed.host_name(jax.process_index())
  workdir_lib.check_shared(workdir, host)


def first_state(
  setup: Setup, checkpoints: Checkpoints, say: Announcer
) -> tuple[TrainState, int, dict[str, Any]]:
  """Returns the newest state of the run, or a fresh one.

  Returns:
    The state, its step, and what was stored with it, see `Checkpoints.save`.

  Raises:
    UserError: no checkpoint of the run is what was written, or they are of
      another model.
  """
  resumed = _resume(setup, checkpoints, say)
  if resumed is not None:
    return resumed
  config = setup.experiment.config
  state = jax.block_until_ready(setup.init(jax.random.key(config.seed)))
  if config.init_from:
    state = init_from(setup, state)
    say(f"weights from {config.init_from}")
  else:
    say(f"initialised with seed {config.seed}")
  return state, 0, {}


def _resume(
  setup: Setup, checkpoints: Checkpoints, say: Announcer
) -> tuple[TrainState, int, dict[str, Any]] | None:
  """Returns the newest state that is intact, None without checkpoints.

  Newer ones that are damaged are set aside, so that the run can save those
  steps again.
  """
  target = restore_target(setup.abstract_state, setup.shardings)
  damages = {}
  for step in reversed(checkpoints.steps()):
    try:
      state = checkpoints.restore(step, target)
    except DamagedCheckpoint as error:
      say(f"refused: {error}")
      damages[step] = error.damage
      continue
    if damages:
      checkpoints.set_aside_damaged(damages)
      for line in checkpoints.set_aside:
        say(f"set aside: {line}")
    say(f"resumed from the checkpoint of step {step}")
    return state, step, checkpoints.run(step)
  if damages:
    # Moved away, they would let the same command start from the beginning.
    raise UserError(
      f"no checkpoint of this run is intact:"
      f" {'; '.join(f'step {step}: {x}' for step, x in damages.items())};"
      " bring files of theirs back, or train anew in another --workdir"
    )
  return None
