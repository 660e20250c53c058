"""Trains a model on the tasks of a config.

python -m narvl_jax.train --config=configs/shapes.py --workdir=runs/shapes

Every key of the config is a flag, such as
--config.optimizer.learning_rate=3e-4. The same command resumes a stopped run.
`--dry_run` prints shapes, parameters, their sharding and the bytes of the
state, and writes nothing; `--dry_run=compile` also compiles the update and
prints its memory; `--explain_sharding` prints only the sharding.
"""

import time

_START = time.monotonic()

# The start-up time includes the imports.
# ruff: noqa: E402
from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.hosts import cluster as cluster_lib


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_config_flag()
  common_flags.workdir()
  common_flags.dry_run()
  flags.DEFINE_bool(
    "explain_sharding",
    False,
    "Print the sharding of every parameter and bytes per device, then stop.",
  )
  cluster_lib.define_flags()
  common_flags.compilation_cache()
  flags.mark_flags_as_required(["config", "workdir"])
  flags.declare_key_flag("config")  # Shown by --help.


def main(argv: Sequence[str]) -> None:
  """Entry point; on failure the last line is the remedy."""
  del argv
  # Imported here, so that --help is fast.
  from narvl_jax.data.batches.workers import quiet_cleanup
  from narvl_jax.reliability import session as hosts
  from narvl_jax.reliability.explain import explain_failure, quiet_failed_saves
  from narvl_jax.reliability.guard import Guard
  from narvl_jax.reliability.ledger import Ledger
  from narvl_jax.run import training_run
  from narvl_jax.run.announce import Announcer
  from narvl_jax.run_folder import workdir as workdir_lib

  settings = flags.FLAGS
  workdir = as_path(settings.workdir)
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
            compiles=settings.dry_run == "compile",
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
