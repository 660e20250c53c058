"""Trains one model on the tasks of a config.

python -m narvl_jax.train --config=configs/shapes.py --workdir=runs/shapes

Every key of the config has a flag, --config.optimizer.learning_rate=3e-4. The
same command resumes a run that was stopped. `--dry_run` prints shapes,
parameters, where they lie and memory, and writes nothing; `--explain_sharding`
prints only where they lie.
"""

import time

_START = time.monotonic()

# The imports are part of the time that a user waits, so the clock runs.
# ruff: noqa: E402
import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.batches.workers import quiet_cleanup
from narvl_jax.errors import UserError
from narvl_jax.evaluation.evaluator import evaluate_tasks
from narvl_jax.evaluation.reporting import format_metrics, format_table
from narvl_jax.evaluation.results import make_way, write_results
from narvl_jax.evaluation.score import flat_metrics, score_of
from narvl_jax.experiment.config_checks import validate
from narvl_jax.hosts import cluster as cluster_lib
from narvl_jax.hosts import distributed
from narvl_jax.reliability import session as hosts
from narvl_jax.reliability.explain import explain_failure, quiet_failed_saves
from narvl_jax.reliability.guard import Guard, check_unchanged
from narvl_jax.reliability.interrupt import EvaluationStopped
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run.announce import Announcer, used_table
from narvl_jax.run.announce import dry_run as print_dry_run
from narvl_jax.run.bad_numbers import BundleWriter
from narvl_jax.run.batches import DeviceBatches, batch_opener
from narvl_jax.run.data_checks import untrained_tasks
from narvl_jax.run.loop import Loop
from narvl_jax.run.run import EVALUATION_DUE, Run
from narvl_jax.run.start import (
  chosen_variables,
  make_up_evaluation,
  open_checkpoints,
  prepare,
  restore_or_init,
  write_run,
)
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.run_folder.metrics import MetricsWriter, SilentMetrics
from narvl_jax.run_folder.restarts import summary
from narvl_jax.state.train_state import TrainState, evaluation_variables
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import show
from narvl_jax.training.setup import Setup


def train(
  config: Any,
  workdir: pathlib.Path,
  *,
  dry_run: bool = False,
  explain_sharding: bool = False,
  ledger: Ledger | None = None,
  guard: Guard | None = None,
) -> dict[str, Any] | None:
  """Trains, or resumes training, and evaluates at the end.

  Args:
    config: see `narvl_jax.experiment.config.default_config`.
    workdir: the run folder.
    dry_run: stop before anything is written or trained.
    explain_sharding: print where every parameter lies, and stop.
    ledger: of the time since the start of the process.
    guard: of the process; None if it does other things than train.

  Returns:
    The report of the final evaluation; None after a dry run.

  Raises:
    UserError: the config is wrong, or the folder holds another run, or one
      that is alive.
    SystemExit: the state was saved after SIGTERM (code 0) or Ctrl-C (130) in
      the loop.
  """
  if guard is None:
    with Guard(workdir, ledger or Ledger()) as guard:
      return train(
        config,
        workdir,
        dry_run=dry_run,
        explain_sharding=explain_sharding,
        guard=guard,
      )
  ledger = guard.ledger
  say = Announcer(ledger)
  with ledger.stage("init"):
    say(f"run folder {workdir}")
    validate(config)
    if not dry_run and not explain_sharding:
      guard.watch(config.watchdog)
    resumes = workdir_lib.check(workdir, config)
    setup, mixture = prepare(config, workdir, resumes, say)
  if explain_sharding and not dry_run:
    show(setup.sharding_table())
  if dry_run:
    print_dry_run(setup, ledger, say)
  if dry_run or explain_sharding:
    return None
  with jax.set_mesh(setup.mesh):
    report = _run(setup, mixture, workdir, resumes, guard, say)
  for line in summary(workdir):
    say(line)
  say("done; where the time went:")
  show(ledger.table())
  return report


def _run(
  setup: Setup,
  mixture: Sequence[MixtureEntry],
  workdir: pathlib.Path,
  resumes: bool,
  guard: Guard,
  say: Announcer,
) -> dict[str, Any]:
  """Takes the folder, restores or initialises, trains, and evaluates."""
  config, ledger = setup.experiment.config, guard.ledger
  with contextlib.ExitStack() as stack:
    with ledger.stage("init"):
      if distributed.is_first():
        guard.take(say)
        check_unchanged(resumes, workdir)
        # Now, and not after days of training.
        make_way(workdir)
      write_run(setup, workdir, resumes)
      checkpoints = stack.enter_context(open_checkpoints(setup, workdir))
      guard.busy = lambda: checkpoints.progress.startswith("saving")
      state, step, stored = restore_or_init(setup, checkpoints, say)
      ledger.progress(step)
      writer = SilentMetrics()
      if distributed.is_first():
        if resumes:
          guard.record_restart(
            step,
            say,
            saved=stored.get("time"),
            damaged=checkpoints.set_aside,
          )
        workdir_lib.write_environment(workdir, step)
        writer = stack.enter_context(MetricsWriter(workdir, step))

    run = Run(setup, mixture, checkpoints, writer, guard, say)
    if stored.get(EVALUATION_DUE):
      evaluate = functools.partial(_validate, run, ledger.progress)
      with ledger.stage("evaluation"):
        make_up_evaluation(run, evaluate, state)
    if step < config.train.steps:
      state = _train(run, state, stored)
      if guard.stop.stopped:
        with ledger.stage("checkpoint"):
          checkpoints.close()
          guard.check_folder()
        guard.stopped(int(state.step))
      guard.stop.finish()
    with ledger.stage("checkpoint"):
      variables, step = chosen_variables(setup, state, checkpoints, say)
    with ledger.stage("evaluation"):
      report = _final_evaluation(run, variables, step)
    # In the line of the last step, even where an earlier one was better.
    values = flat_metrics(report) | {f"{report['split']}/step": float(step)}
    writer.write(int(state.step), values)
    with ledger.stage("checkpoint"):
      checkpoints.wait()
      guard.check_folder()
  return report


def _train(
  run: Run, state: TrainState, stored: Mapping[str, Any]
) -> TrainState:
  """Starts the data, compiles the update and runs the loop."""
  setup, guard, say = run.setup, run.guard, run.say
  # Before the compilation, which leaves time to fill the buffers.
  with DeviceBatches(
    batch_opener(setup, run.mixture),
    stored.get("data_position", int(state.step)),
    setup.mesh,
    tuple(setup.batch),
    run.config.train.batch_size,
  ) as batches:
    say("compiling the step, which takes minutes for a large model")
    with guard.ledger.stage("compile"), progress.doing("compiling the step"):
      train_step = setup.compile_step()
    say(f"compiled in {guard.ledger.seconds()['compile']:.1f} s")
    if setup.teacher is not None:
      train_step = functools.partial(train_step, setup.teacher.read())
    # Gloo, on CPUs, gives a host half a minute for its first collective.
    distributed.barrier("step compiled")

    def before_batch() -> None:
      guard.ledger.progress()
      if guard.stop.due():
        raise EvaluationStopped

    loop = Loop(
      run,
      train_step=train_step,
      batches=batches,
      evaluate=functools.partial(_validate, run, before_batch),
      restore=functools.partial(restore_or_init, setup, run.checkpoints, say),
      bundles=BundleWriter(
        run.workdir, run.config, setup.mesh, batches.examples
      ),
    )
    state = loop.train(state, stored)
    say("training used:")
    show(used_table(run.mixture, batches.counters(batches.position)))
    if any(loop.health.counts().values()):
      say(str(loop.health))
    return state


def _validate(
  run: Run, before_batch: Callable[[], None], state: TrainState, step: int
) -> tuple[dict[str, float], float | None]:
  """Returns the metrics to write, and the score that ranks checkpoints."""
  config = run.config
  report, _ = evaluate_tasks(
    run.experiment,
    evaluation_variables(state),
    split=config.train.eval_split,
    max_examples=config.train.eval_examples,
    step=step,
    before_batch=before_batch,
  )
  score = score_of(report, config.evaluation.best_metric)
  untrained = untrained_tasks(run.experiment, run.mixture, step)
  run.say(f"step {step} on {config.train.eval_split}:")
  notes = dict.fromkeys(untrained, "not trained yet")
  show(format_metrics(report, notes, kinds=False))
  return flat_metrics(report), score


def _final_evaluation(
  run: Run, variables: Mapping[str, Any], step: int
) -> dict[str, Any]:
  settings = run.config.evaluation
  limit = settings.max_examples
  extent = f"at most {limit} a source" if limit else "all"
  run.say(f"evaluating step {step} on {settings.split}, {extent}")
  report, predictions = evaluate_tasks(
    run.experiment,
    variables,
    split=settings.split,
    max_examples=limit or None,
    step=step,
    before_batch=run.guard.ledger.progress,
  )
  untrained = untrained_tasks(run.experiment, run.mixture, step)
  show(format_table(report, dict.fromkeys(untrained, "not trained")))
  run.guard.check_folder()
  if distributed.is_first():
    for path in write_results(run.experiment, run.workdir, report, predictions):
      show(f"wrote {path}")
  return report


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_config_flag()
  common_flags.workdir()
  flags.DEFINE_bool(
    "dry_run", False, "Print shapes, parameters and memory, then stop."
  )
  flags.DEFINE_bool(
    "explain_sharding",
    False,
    "Print where every parameter lies and the bytes on a device, then stop.",
  )
  cluster_lib.define_flags()
  flags.mark_flags_as_required(["config", "workdir"])
  flags.declare_key_flag("config")  # Shown by --help.


def main(argv: Sequence[str]) -> None:
  """Entry point; on failure the last line says what to do."""
  del argv
  settings = flags.FLAGS
  workdir = pathlib.Path(settings.workdir)
  ledger = Ledger(start=_START)
  only_prints = settings.dry_run or settings.explain_sharding
  quiet_failed_saves()
  quiet_cleanup()

  def explain(error: BaseException) -> tuple[int, str]:
    return explain_failure(error, workdir)

  try:
    with Guard(workdir, ledger, leave=hosts.leave) as guard:
      cluster = cluster_lib.detect(settings)
      if cluster is not None:
        workdir_lib.check_folder(workdir)
      logs = None if only_prints else workdir / hosts.LOG_FOLDER
      with (
        hosts.outliving_terminal(logs if cluster is None else None),
        hosts.together(
          cluster,
          logs,
          lambda: workdir_lib.facts(settings.config),
          explain,
          Announcer(ledger),
          guard.end,
        ) as notices,
      ):
        guard.connect(notices)
        train(
          settings.config,
          workdir,
          dry_run=settings.dry_run,
          explain_sharding=settings.explain_sharding,
          guard=guard,
        )
  except (UserError, BrokenPipeError):
    raise
  except (KeyboardInterrupt, Exception) as error:
    hosts.end(error, *explain(error))


if __name__ == "__main__":
  define_flags()
  cli.run(main)
