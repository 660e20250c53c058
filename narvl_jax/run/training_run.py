"""A training run, from its config to the report of its final evaluation."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from narvl_jax.errors import UserError
from narvl_jax.evaluation.evaluator import evaluate_tasks
from narvl_jax.evaluation.metric import Options
from narvl_jax.evaluation.reporting import format_metrics, format_table
from narvl_jax.evaluation.results import make_way, write_results
from narvl_jax.evaluation.score import flat_metrics, score_of
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.datasets import DataSets, set_epoch
from narvl_jax.files.paths import check_folder
from narvl_jax.hosts import distributed
from narvl_jax.reliability.guard import Guard, check_unchanged
from narvl_jax.reliability.interrupt import EvaluationStopped
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run.announce import Announcer, dry_run, used_table
from narvl_jax.run.bad_numbers import BundleWriter
from narvl_jax.run.batches import DeviceBatches, batch_opener
from narvl_jax.run.data_checks import untrained_tasks
from narvl_jax.run.dump import dump_programs
from narvl_jax.run.loop import Loop
from narvl_jax.run.out_of_memory import explained
from narvl_jax.run.run import EVALUATION_DUE, Run
from narvl_jax.run.start import (
  Start,
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
from narvl_jax.run_folder.trackers import check_trackers
from narvl_jax.state.train_state import TrainState, evaluation_variables
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import show
from narvl_jax.warm_start.init_from import Plan


def train(
  config: Any, workdir: pathlib.Path, *, ledger: Ledger | None = None
) -> dict[str, Any]:
  """Trains or resumes a run; returns the report of its final evaluation.

  Args:
    config: see `narvl_jax.experiment.config.default_config`.
    ledger: ledger of the time since the start of the process.

  Raises:
    UserError: the config is wrong, or the folder contains another run or a
      live one.
    SystemExit: the state was saved after SIGTERM (code 0) or Ctrl-C (130) in
      the loop.
  """
  with Guard(workdir, ledger or Ledger()) as guard:
    return train_guarded(config, workdir, guard)


def train_guarded(
  config: Any, workdir: pathlib.Path, guard: Guard
) -> dict[str, Any]:
  """Like `train`, under a guard of the whole process."""
  say = Announcer(guard.ledger)
  with guard.ledger.stage("init"):
    say(f"run folder {workdir}")
    validate(config)
    check_trackers(config)
    guard.watch(config.watchdog)
    start, resumes = _start(config, workdir, say)
  with jax.set_mesh(start.setup.mesh):
    report = _run(start, workdir, resumes, guard, say)
  for line in summary(workdir):
    say(line)
  say(f"since the first start: {guard.goodput()}")
  say("done; where the time went:")
  show(guard.ledger.table())
  return report


def print_plan(
  config: Any,
  workdir: pathlib.Path,
  guard: Guard,
  *,
  only_sharding: bool = False,
  compiles: bool = False,
) -> None:
  """Prints shapes, sharding and memory of a run; writes nothing.

  Args:
    only_sharding: print only where every parameter lies.
    compiles: compile the update, to print the memory that it needs.

  Raises:
    UserError: see `train`.
  """
  say = Announcer(guard.ledger)
  with guard.ledger.stage("init"):
    say(f"run folder {workdir}")
    validate(config)
    check_trackers(config)
    start, _ = _start(config, workdir, say)
  if only_sharding:
    show(start.setup.sharding_table())
  else:
    dry_run(start.setup, guard.ledger, say, compiles)


def _start(
  config: Any, workdir: pathlib.Path, say: Announcer
) -> tuple[Start, bool]:
  """Returns the checked start, and whether the folder contains the run."""
  for key in ("profile.dir", "debug.dump_hlo"):
    section, _, name = key.partition(".")
    if folder := config[section][name]:
      check_folder(f"--config.{key}", folder)
  datasets = DataSets(config)
  set_epoch(datasets)
  counts = distributed.gather_json(int(config.train.epoch_examples))
  if len(set(counts)) > 1:
    raise UserError(
      f"hosts count different numbers of examples in data.train:"
      f" {', '.join(map(str, counts))}; give all hosts the same files"
      " (--config.data.train)"
    )
  resumes = workdir_lib.check(workdir, config)
  return prepare(datasets, workdir, resumes, say), resumes


def _run(
  start: Start,
  workdir: pathlib.Path,
  resumes: bool,
  guard: Guard,
  say: Announcer,
) -> dict[str, Any]:
  """Acquires the folder, restores or initialises, trains, and evaluates."""
  setup, ledger = start.setup, guard.ledger
  config = setup.experiment.config
  with contextlib.ExitStack() as stack:
    stack.enter_context(explained(setup, workdir, ledger))
    with ledger.stage("init"):
      if distributed.is_first():
        guard.lock_folder(say)
        check_unchanged(resumes, workdir)
        # Checked now, not after days of training.
        make_way(workdir)
      write_run(setup, workdir, resumes)
      checkpoints = stack.enter_context(open_checkpoints(setup, workdir))
      guard.busy = lambda: checkpoints.progress.startswith("saving")
      state, step, stored = restore_or_init(
        setup, checkpoints, say, start.weights
      )
      ledger.resume(step)
      writer = SilentMetrics()
      if distributed.is_first():
        if resumes:
          guard.record_restart(
            step, say, saved=stored.get("time"), damaged=checkpoints.set_aside
          )
        workdir_lib.write_environment(workdir, step)
        writer = stack.enter_context(MetricsWriter(workdir, step, config))

    run = Run(setup, start.mixture, checkpoints, writer, guard, say)
    if stored.get(EVALUATION_DUE):
      evaluate = functools.partial(_validate, run, ledger.progress)
      with ledger.stage("evaluation"):
        make_up_evaluation(run, evaluate, state)
    if step < config.train.steps:
      state = _train(run, state, stored, start.weights)
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
    # The metrics belong to the line of the last step, even if an earlier
    # checkpoint was better.
    values = flat_metrics(report) | {f"{report['split']}/step": float(step)}
    writer.write(int(state.step), values)
    with ledger.stage("checkpoint"):
      checkpoints.wait()
      guard.check_folder()
  return report


def _train(
  run: Run,
  state: TrainState,
  stored: Mapping[str, Any],
  weights: Plan | None = None,
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
      train_step = compiled = setup.compile_step()
    say(f"compiled in {guard.ledger.seconds()['compile']:.1f} s")
    if run.config.debug.dump_hlo:
      with guard.ledger.stage("compile"):
        dump_programs(setup, train_step, run.config.debug.dump_hlo, say)
    train_step = functools.partial(train_step, setup.read_inputs())
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
      restore=functools.partial(
        restore_or_init, setup, run.checkpoints, say, weights
      ),
      bundles=BundleWriter(
        run.workdir, run.config, setup.mesh, batches.examples
      ),
    )
    with explained(setup, run.workdir, guard.ledger, compiled):
      state = loop.train(state, stored)
    say("training used:")
    show(used_table(run.mixture.entries, batches.counters(batches.position)))
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
  untrained = untrained_tasks(run.mixture, step)
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
    options=Options(intervals=True),
  )
  untrained = untrained_tasks(run.mixture, step)
  show(format_table(report, dict.fromkeys(untrained, "not trained")))
  run.guard.check_folder()
  if distributed.is_first():
    for path in write_results(run.experiment, run.workdir, report, predictions):
      show(f"wrote {path}")
      if path.suffix == ".png":
        name = "mistakes" if "mistakes" in path.stem else "samples"
        run.writer.write_image(run.config.train.steps, name, path)
  return report
