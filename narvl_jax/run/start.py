"""The start of a run: its checks, its folder and its initial state."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from narvl_jax.checkpointing.chosen import choose_step
from narvl_jax.checkpointing.integrity import DamagedCheckpoint
from narvl_jax.checkpointing.record import CheckpointRecord
from narvl_jax.checkpointing.record_checks import check_config, check_vocabulary
from narvl_jax.checkpointing.runs import build_in
from narvl_jax.checkpointing.weights import opened
from narvl_jax.checkpointing.writing import Checkpoints, restore_target
from narvl_jax.data.answers import load_answers
from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.errors import UserError
from narvl_jax.experiment.datasets import DataSets
from narvl_jax.experiment.vocabulary import check_vocabulary_files
from narvl_jax.hosts import distributed
from narvl_jax.parallel import check_batch_size, local_rows, mesh_from_config
from narvl_jax.parallel.mesh import describe
from narvl_jax.run import data_checks as run_data
from narvl_jax.run.announce import Announcer, describe_model, describe_source
from narvl_jax.run.run import EVALUATION_DUE, Evaluate, Run
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.run_folder.workdir import save_experiment
from narvl_jax.state.train_state import TrainState, evaluation_variables
from narvl_jax.terminal import progress
from narvl_jax.training.setup import Setup, build_setup
from narvl_jax.warm_start.init_from import Plan, init_from, plan_weights


class Start(NamedTuple):
  """Everything that a run needs before its first state.

  Attributes:
    weights: where the parameters of a new run come from; None: not planned.
  """

  setup: Setup
  mixture: Mixture
  weights: Plan | None


def prepare(
  datasets: DataSets, workdir: pathlib.Path, resumes: bool, say: Announcer
) -> Start:
  """Builds and checks everything that a run needs; writes nothing.

  Args:
    datasets: datasets of a config that was validated.
    workdir: the run folder; the vocabulary of a run in it is used.
    resumes: whether it contains a run.

  Raises:
    UserError: something that the config names is missing or wrong.
  """
  config = datasets.config
  mesh = mesh_from_config(config.mesh)
  say(f"mesh {describe(mesh)}")
  # Missing files are found before a vocabulary is trained.
  _check_files(config, resumes)
  entries = datasets.train
  run_data.check_evaluation(datasets)
  experiment = build_in(config, workdir, datasets)
  say(
    f"vocabulary {experiment.vocabulary.size} ids,"
    f" tasks {', '.join(experiment.tasks)}"
  )
  steps, batch_size = config.train.steps, config.train.batch_size
  check_batch_size(
    batch_size, mesh, accumulation_steps=config.train.accumulation_steps
  )
  rows = local_rows(mesh, batch_size)
  mixture = run_data.make_mixture(config, entries, rows)
  for note in run_data.check_targets(experiment, entries):
    say(f"note: {note}")
  run_data.check_answers(experiment, entries)
  for entry, count in zip(entries, mixture.used(steps), strict=True):
    say(describe_source(entry.source, entry.task, entry.name, count, steps))
  with progress.doing("tracing the model"):
    setup = build_setup(experiment, mesh)
  weights = None
  if config.init_from and not resumes:
    weights = plan_weights(setup)
    for note in weights.notes:
      say(f"note: {note}")
  describe_model(setup, say)
  return Start(setup, mixture, weights)


def _check_files(config: Any, resumes: bool) -> None:
  """Raises `UserError` for missing or invalid files other than the data."""
  if not resumes:
    check_vocabulary_files(config)
  for task in config.tasks.values():
    if task.get("answers"):
      load_answers(task.answers)
  named = {"distillation.teacher": config.distillation.teacher}
  if not config.distillation.weight:
    named = {}
  if not resumes:
    named["init_from"] = config.init_from
  for key, path in named.items():
    if path:
      with opened(path, key):
        pass


def write_run(setup: Setup, workdir: pathlib.Path, resumes: bool) -> None:
  """Writes config, vocabulary and sharding table, on the first host."""
  # Every host has looked for an existing run before this one is written.
  distributed.barrier("run folder checked")
  if distributed.is_first():
    if not resumes:
      save_experiment(workdir, setup.experiment)
    workdir_lib.write_sharding(workdir, setup.sharding_table())
  distributed.barrier("run folder written")
  host = distributed.host_name(jax.process_index())
  workdir_lib.check_shared(workdir, host)


def open_checkpoints(setup: Setup, workdir: pathlib.Path) -> Checkpoints:
  """Opens the checkpoints of a run for saving and restoring."""
  config = setup.experiment.config
  return Checkpoints(
    workdir,
    keep_last=config.train.keep_last,
    keep_best=config.train.keep_best,
    keep_every=config.train.keep_every,
    config=config,
    vocabulary=setup.experiment.vocabulary.fingerprint,
  )


def restore_or_init(
  setup: Setup,
  checkpoints: Checkpoints,
  say: Callable[[str], None],
  weights: Plan | None = None,
) -> tuple[TrainState, int, dict[str, Any]]:
  """Returns the newest intact state of the run, or a fresh one.

  Args:
    weights: plan for a fresh state with `init_from`; None: planned if needed.

  Returns:
    The state, its step, and `CheckpointRecord.run`.

  Raises:
    UserError: no checkpoint of the run is intact, or they are of another
      model.
  """
  resumed = _resume(setup, checkpoints, say)
  if resumed is not None:
    return resumed
  config = setup.experiment.config
  with progress.doing("initialising the state"):
    state = jax.block_until_ready(setup.init(jax.random.key(config.seed)))
  if config.init_from:
    with progress.doing(f"reading the weights of {config.init_from}"):
      state = init_from(setup, state, weights or plan_weights(setup))
    say(f"weights from {config.init_from}")
  else:
    say(f"initialised with seed {config.seed}")
  with progress.doing("compiling the checksums of checkpoints"):
    checkpoints.prepare(state)
  return state, 0, {}


def make_up_evaluation(run: Run, evaluate: Evaluate, state: TrainState) -> None:
  """Evaluates a restored state whose evaluation was interrupted.

  Metrics and score become those of a run without the interruption.
  """
  step = int(state.step)
  run.say(f"evaluating step {step}: its evaluation was stopped")
  metrics, score = evaluate(state, step)
  run.writer.write(step, metrics)
  # A checkpoint is never ahead of the metrics on disk.
  run.writer.flush()
  stored = {**run.checkpoints.read_record(step).run, EVALUATION_DUE: False}
  run.checkpoints.set_score(step, score, stored)


def chosen_variables(
  setup: Setup,
  state: TrainState,
  checkpoints: Checkpoints,
  say: Callable[[str], None],
) -> tuple[dict[str, Any], int]:
  """Returns the variables of the best checkpoint and its step.

  The best one is chosen by `choose_step`, as in `evaluate` and `predict`.
  Damaged checkpoints are set aside.

  Returns:
    Variables {"params", "batch_stats"} on the mesh, moving averages if the run
    has them; and the step of the checkpoint.
  """
  checkpoints.wait()
  target = restore_target(setup.abstract_state, setup.shardings)
  while (step := choose_step(checkpoints, "best")) != int(state.step):
    try:
      variables = checkpoints.restore_variables(
        step,
        {"params": target.params, "batch_stats": target.batch_stats},
        target.ema,
      )
    except DamagedCheckpoint as error:
      say(f"rejected: {error}")
      checkpoints.set_aside_damaged({step: error.damage})
      continue
    return variables, step
  return evaluation_variables(state), step


def _check_same_run(
  setup: Setup, checkpoints: Checkpoints, record: CheckpointRecord
) -> None:
  """Raises `UserError` if a checkpoint is of another config or vocabulary."""
  if record.config is None:
    return
  folder, experiment = checkpoints.workdir, setup.experiment
  check_config(folder, experiment.config, record, resumes=True)
  check_vocabulary(folder, experiment.vocabulary.fingerprint, record)


def _resume(
  setup: Setup, checkpoints: Checkpoints, say: Callable[[str], None]
) -> tuple[TrainState, int, dict[str, Any]] | None:
  """Returns the newest intact state; None if there are no checkpoints.

  Newer, damaged checkpoints are set aside so that those steps can be saved
  again.
  """
  target = restore_target(setup.abstract_state, setup.shardings)
  damages = {}
  for step in reversed(checkpoints.steps()):
    try:
      record = checkpoints.read_record(step)
      _check_same_run(setup, checkpoints, record)
      with progress.doing(f"reading the checkpoint of step {step}"):
        state = checkpoints.restore(step, target)
    except DamagedCheckpoint as error:
      say(f"rejected: {error}")
      damages[step] = error.damage
      continue
    if damages:
      checkpoints.set_aside_damaged(damages)
      for line in checkpoints.set_aside:
        say(f"set aside: {line}")
    say(f"resumed from the checkpoint of step {step}")
    return state, step, record.run
  if damages:
    # They are kept: without them the same command would start from step 0.
    raise UserError(
      f"no checkpoint of this run is intact:"
      f" {'; '.join(f'step {step}: {x}' for step, x in damages.items())};"
      " restore their files, or train again in another --workdir"
    )
  return None
