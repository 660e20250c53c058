"""How a run begins: its folder, and the state of the first step."""

import pathlib

import jax

from narvl_jax.experiment import Experiment
from narvl_jax.parallel import distributed
from narvl_jax.training import workdir as workdir_lib
from narvl_jax.training.announce import Announcer
from narvl_jax.training.checkpoints import Checkpoints, restore_target
from narvl_jax.training.init_from import init_from
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
) -> tuple[TrainState, int]:
  """Returns the newest state of the run, or a fresh one, and its step."""
  step = checkpoints.last_step
  if step is not None:
    target = restore_target(setup.abstract_state, setup.shardings)
    state = checkpoints.restore(step, target)
    say(f"resumed from the checkpoint of step {step}")
    return state, step
  config = setup.experiment.config
  state = jax.block_until_ready(setup.init(jax.random.key(config.seed)))
  if config.init_from:
    state = init_from(setup, state)
    say(f"weights from {config.init_from}")
  else:
    say(f"initialised with seed {config.seed}")
  return state, 0
