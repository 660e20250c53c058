r"""Lists, verifies and compares the checkpoints of a run.

python -m narvl_jax.checkpoints list runs/shapes
python -m narvl_jax.checkpoints verify runs/shapes [--checkpoint=3000]
python -m narvl_jax.checkpoints diff runs/shapes --checkpoint=best,last
python -m narvl_jax.checkpoints diff runs/shapes runs/other
python -m narvl_jax.checkpoints restore_config runs/shapes

The command builds no model and uses no accelerator. `verify` reads every file
and exits with code 2 if one differs from what was written. `diff` compares,
array by array, the newest checkpoints of two runs or the two of --checkpoint.
`restore_config` recreates a lost or changed config.json from the newest intact
checkpoint; the old file becomes config.json.old.
"""

from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.text import show

_COMMANDS = ("list", "verify", "diff", "restore_config")


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.workdir("Folder of the run, instead of DIR.")
  flags.DEFINE_list(
    "checkpoint",
    None,
    "best, last or a step. verify: only this one; diff: the two, A,B.",
  )
  common_flags.rename("step", "checkpoint")
  common_flags.rename("steps", "checkpoint")


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  # Imported here, so that --help is fast.
  from narvl_jax.checkpointing import overview

  command, *places = argv[1:]
  if command not in _COMMANDS:
    raise UserError(
      f'unknown command "{command}".{did_you_mean(command, _COMMANDS)}'
    )
  chosen = flags.FLAGS.checkpoint
  if flags.FLAGS.workdir:
    places.insert(0, flags.FLAGS.workdir)
  _check(command, places, chosen)
  workdirs = [as_path(place) for place in places]
  match command:
    case "list":
      text = overview.list_checkpoints(workdirs[0])
    case "restore_config":
      text = overview.restore_config(workdirs[0])
    case "verify":
      text = overview.verify(workdirs[0], chosen and chosen[0])
    case _:
      text = overview.diff(*overview.find_pair(workdirs, chosen))
  show(text)


def _check(
  command: str, places: Sequence[str], chosen: Sequence[str] | None
) -> None:
  """Raises UserError for arguments that do not belong together."""
  if chosen is not None and command in ("list", "restore_config"):
    raise UserError(
      f"--checkpoint={','.join(chosen)} is for verify and diff; leave it out of"
      f" {command}"
    )
  if not places:
    raise UserError(
      f"the folder of the run is missing: checkpoints {command} DIR, or"
      " --workdir=DIR"
    )
  if len(places) > 1 and command != "diff":
    raise UserError(
      f'unexpected argument "{places[1]}"; {command} needs one run'
    )
  if command == "verify" and chosen is not None and len(chosen) != 1:
    raise UserError(
      f"--checkpoint={','.join(chosen)}: verify reads one checkpoint, or all"
      " without --checkpoint"
    )


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=(1, 3), positional_name=", ".join(_COMMANDS))
