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
import pathlib
from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.errors import UserError
from narvl_jax.hosts import cluster as cluster_lib


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
  # --help does without them.
  from narvl_jax.data.batches.workers import quiet_cleanup
  from narvl_jax.reliability import session as hosts
  from narvl_jax.reliability.explain import explain_failure, quiet_failed_saves
  from narvl_jax.reliability.guard import Guard
  from narvl_jax.reliability.ledger import Ledger
  from narvl_jax.run import training_run
  from narvl_jax.run.announce import Announcer
  from narvl_jax.run_folder import workdir as workdir_lib

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
      logs = None if only_prints else workdir / cluster_lib.LOG_FOLDER
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
        if only_prints:
          training_run.print_plan(
            settings.config,
            workdir,
            guard,
            only_sharding=not settings.dry_run,
          )
        else:
          training_run.train_guarded(settings.config, workdir, guard)
  except (UserError, BrokenPipeError):
    raise
  except (KeyboardInterrupt, Exception) as error:
    hosts.end(error, *explain(error))


if __name__ == "__main__":
  define_flags()
  cli.run(main)
