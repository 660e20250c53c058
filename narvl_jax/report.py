"""Writes one HTML page about a run.

python -m narvl_jax.report runs/shapes [--to=report.html]

The page has the curves of training, the tables and pictures of the evaluation,
the time of each stage, the restarts, and the settings that differ from the
defaults. It needs no other file and no network. Parts that a run does not have
are named as missing. By default it is report.html in the run folder.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.errors import UserError
from narvl_jax.files.disk import write_text
from narvl_jax.files.paths import check_file
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.text import show

_FILE = "report.html"


def report(
  workdir: str | os.PathLike[str], to: str | os.PathLike[str] | None = None
) -> pathlib.Path:
  """Writes the page of a run.

  Args:
    workdir: run folder.
    to: file; report.html in the run folder if None.

  Returns:
    The file.

  Raises:
    UserError: the folder has no run, or the file cannot be written.
  """
  # Imported here, so that --help is fast.
  from narvl_jax.inspection.run_page import run_page
  from narvl_jax.run_folder import workdir as workdir_lib

  folder = as_path(workdir)
  if not workdir_lib.is_run(folder):
    raise UserError(
      f'"{folder}" has no run: there is no {workdir_lib.CONFIG_FILE}; give'
      " the folder that was the --workdir of `train`"
    )
  path = folder / _FILE if to is None else as_path(to)
  check_file("--to", path)
  write_text(path, run_page(folder))
  show(f"wrote {path}")
  return path


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.to(f"HTML file; {_FILE} in the run folder by default.")


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  report(argv[1], flags.FLAGS.to)


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1, positional_name="the run folder")
