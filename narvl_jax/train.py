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
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from narvl_jax import cli, run_data
from narvl_jax import experiment as experiment_lib
from narvl_jax.config_checks import validate
from narvl_jax.data.pipeline import BadRecords, TrainBatches, train_batches
from narvl_jax.errors import UserError
from narvl_jax.evaluation.evaluator import evaluate_tasks
from narvl_jax.evaluation.reporting import format_table
from narvl_jax.evaluation.results import write_results
from narvl_jax.parallel import distributed, local_rows, mesh_from_config
from narvl_jax.parallel.mesh import describe
from narvl_jax.training import hosts
from narvl_jax.training import workdir as workdir_lib
from narvl_jax.training.announce import (
  Announcer,
  describe_model,
  explain_failure,
)
from narvl_jax.training.announce import dry_run as print_dry_run
from narvl_jax.training.bad_numbers import BundleWriter
from narvl_jax.training.checkpoints import Checkpoints
from narvl_jax.training.constrained import check_answers
from narvl_jax.training.failures import summary
from narvl_jax.training.guard import Guard, check_unchanged
from narvl_jax.training.init_from import check_init_from
from narvl_jax.training.interrupt import EvaluationStopped, StopRequest
from narvl_jax.training.ledger import Ledger
from narvl_jax.training.loop import Loop
from narvl_jax.training.metrics import MetricsWriter, SilentMetrics
from narvl_jax.training.prefetch import DeviceBatches
from narvl_jax.training.score import flat_metrics, score_of
from narvl_jax.training.setup import Setup, build_setup
from narvl_jax.training.start import first_state, write_run
from narvl_jax.training.train_state import TrainState, evaluation_variables


def train(
  config: Any,
  workdir: pathlib.Path,
  *,
  dry_run: bool = False,
  explain_sharding: bool = False,
  ledger: Ledger | None = None,
  guard: Guard | None = None,
) -> dict[str, Any] | None:
  """Trains, or goes on training, and evaluates at the end.

  Args:
    config: see `narvl_jax.config.default_config`.
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
    mesh = mesh_from_config(config.mesh)
    say(f"mesh {describe(mesh)}")
    experiment = experiment_lib.build(config, workdir)
    say(
      f"vocabulary {experiment.vocabulary.size} ids,"
      f" tasks {', '.join(experiment.tasks)}"
    )
    mixture = run_data.load_mixture(config)
    used = run_data.check_mixture(experiment, mixture).used(config.train.steps)
    for note in run_data.check_targets(experiment, mixture):
      say(f"note: {note}")
    check_answers(experiment, mixture)
    run_data.check_evaluation(config)
    for (source, task, _, name), count in zip(mixture, used, strict=True):
      say(
        f"source {name}: {len(source)} examples for {task},"
        f" {count / len(source):.2f} epochs in {config.train.steps} steps"
      )
    setup = build_setup(experiment, mesh)
    if config.init_from and not resumes:
      for note in check_init_from(setup):
        say(f"note: {note}")
    describe_model(setup, say)
  if explain_sharding and not dry_run:
    print(setup.sharding_table(), flush=True)
  if dry_run:
    print_dry_run(setup, ledger, say)
  if dry_run or explain_sharding:
    return None

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    with ledger.stage("init"):
      if distributed.is_first():
        guard.take(say)
        check_unchanged(resumes, workdir)
      write_run(experiment, setup, workdir, resumes)
      checkpoints = stack.enter_context(
        Checkpoints(
          workdir,
          keep_last=config.train.keep_last,
          keep_best=config.train.keep_best,
          keep_every=config.train.keep_every,
          config=config,
        )
      )
      state, first_step, stored = first_state(setup, checkpoints, say)
      guard.busy = lambda: checkpoints.progress.startswith("saving")
      ledger.progress(first_step)
      if distributed.is_first():
        if resumes:
          guard.record_restart(
            first_step,
            say,
            saved=stored.get("time"),
            damaged=checkpoints.set_aside,
          )
        workdir_lib.write_environment(workdir, first_step)
        writer = stack.enter_context(MetricsWriter(workdir, first_step))
      else:
        writer = SilentMetrics()

    if first_step < config.train.steps:
      state = _fit(
        setup,
        state,
        stored,
        mixture,
        workdir,
        checkpoints,
        writer,
        ledger,
        guard.stop,
        say,
      )
      if guard.stop.stopped:
        with ledger.stage("checkpoint"):
          checkpoints.close()
        guard.stopped(int(state.step))
      guard.stop.finish()
    with ledger.stage("evaluation"):
      report = _final_evaluation(
        experiment, state, workdir, writer, ledger, say
      )
    with ledger.stage("checkpoint"):
      checkpoints.wait()
  for line in summary(workdir):
    say(line)
  say("done; where the time went:")
  print(ledger.table(), flush=True)
  return report


def _fit(
  setup: Setup,
  state: TrainState,
  stored: Mapping[str, Any],
  mixture: Sequence[run_data.MixtureEntry],
  workdir: pathlib.Path,
  checkpoints: Checkpoints,
  writer: MetricsWriter | SilentMetrics,
  ledger: Ledger,
  stop: StopRequest,
  say: Announcer,
) -> TrainState:
  """Starts the data, compiles the step and runs the loop."""
  experiment = setup.experiment
  config = experiment.config
  # Before the compilation, which leaves time to fill the buffers.
  with DeviceBatches(
    _opener(setup, mixture),
    stored.get("data_position", int(state.step)),
    setup.mesh,
    tuple(setup.batch),
    config.train.batch_size,
  ) as batches:
    say("compiling the step")
    with ledger.stage("compile"):
      step = setup.compile_step()
    say(f"compiled in {ledger.seconds()['compile']:.1f} s")
    if setup.teacher is not None:
      step = functools.partial(step, setup.teacher.read())
    # Gloo, on CPUs, gives a host half a minute for its first collective.
    distributed.barrier("step compiled")

    def before_batch() -> None:
      ledger.progress()
      if stop.due():
        raise EvaluationStopped

    def evaluate(
      state: TrainState, step: int
    ) -> tuple[dict[str, float], float | None]:
      report, _ = evaluate_tasks(
        experiment,
        evaluation_variables(state),
        split=config.train.eval_split,
        max_examples=config.train.eval_examples,
        batch_size=config.evaluation.batch_size,
        step=step,
        before_batch=before_batch,
      )
      metrics = flat_metrics(report)
      score = score_of(report, config.evaluation.best_metric)
      shown = "  ".join(f"{k} {100 * v:.1f} %" for k, v in metrics.items())
      say(f"step {step} {config.train.eval_split}: {shown}")
      return metrics, score

    loop = Loop(
      setup=setup,
      step=step,
      batches=batches,
      writer=writer,
      checkpoints=checkpoints,
      evaluate=evaluate,
      restore=functools.partial(first_state, setup, checkpoints, say),
      bundles=BundleWriter(workdir, config, setup.mesh, batches.examples),
      ledger=ledger,
      stop=stop,
      say=say,
    )
    state = loop.run(state, stored)
    say.used(batches.counters(batches.position))
    say(str(loop.health))
    return state


def _opener(
  setup: Setup, mixture: Sequence[run_data.MixtureEntry]
) -> Callable[[int], TrainBatches]:
  """Returns the function position -> this host's batches from there on."""
  experiment = setup.experiment
  config = experiment.config
  return functools.partial(
    train_batches,
    mixture,
    experiment.tasks,
    batch_size=config.train.batch_size,
    seed=config.seed,
    rows=local_rows(setup.mesh, config.train.batch_size),
    image_size=tuple(config.data.image_size),
    max_text_length=config.data.max_text_length,
    max_label_length=experiment.label_length,
    temperature=config.data.temperature,
    num_workers=config.data.num_workers,
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
    # Their count goes on where the batches are opened again.
    bad_records=BadRecords(config.data.max_bad_fraction),
  )


def _final_evaluation(
  experiment: experiment_lib.Experiment,
  state: TrainState,
  workdir: pathlib.Path,
  writer: MetricsWriter | SilentMetrics,
  ledger: Ledger,
  say: Announcer,
) -> dict[str, Any]:
  settings = experiment.config.evaluation
  step = int(state.step)
  limit = settings.max_examples
  extent = f"at most {limit} a source" if limit else "all"
  say(f"evaluating step {step} on {settings.split}, {extent}")
  report, predictions = evaluate_tasks(
    experiment,
    evaluation_variables(state),
    split=settings.split,
    max_examples=limit or None,
    batch_size=settings.batch_size,
    step=step,
    before_batch=ledger.progress,
  )
  print(format_table(report), flush=True)
  if distributed.is_first():
    for path in write_results(experiment, workdir, report, predictions):
      print(f"wrote {path}")
  writer.write(step, flat_metrics(report))
  return report


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_config_flag()
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_bool(
    "dry_run", False, "Print shapes, parameters and memory, then stop."
  )
  flags.DEFINE_bool(
    "explain_sharding",
    False,
    "Print where every parameter lies and the bytes on a device, then stop.",
  )
  distributed.define_flags()
  flags.mark_flags_as_required(["config", "workdir"])
  flags.declare_key_flag("config")  # Shown by --help.


def main(argv: Sequence[str]) -> None:
  """Entry point; on failure the last line says what to do."""
  del argv
  settings = flags.FLAGS
  workdir = pathlib.Path(settings.workdir)
  ledger = Ledger(start=_START)
  only_prints = settings.dry_run or settings.explain_sharding

  def explain(error: BaseException) -> tuple[int, str]:
    return explain_failure(error, workdir)

  try:
    with Guard(workdir, ledger, leave=hosts.leave) as guard:
      cluster = distributed.detect(settings)
      if cluster is not None:
        workdir_lib.check_folder(workdir)
      with hosts.together(
        cluster,
        None if only_prints else workdir / hosts.LOG_FOLDER,
        lambda: workdir_lib.facts(settings.config),
        explain,
        Announcer(ledger),
        guard.end,
      ) as notices:
        guard.connect(notices)
        train(
          settings.config,
          workdir,
          dry_run=settings.dry_run,
          explain_sharding=settings.explain_sharding,
          guard=guard,
        )
  except UserError:
    raise
  except (KeyboardInterrupt, Exception) as error:
    code, message = explain(error)
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
