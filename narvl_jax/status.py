"""Shows the state of runs: alive or not, step, loss, time left, checkpoint.

python -m narvl_jax.status runs/a gs://bucket/runs/b [--watch=30] [--json]

Only reads the run folders, so it can be used on any machine that sees them. A
live run gives a sign of life every five seconds (15 in a bucket); where the
clocks of two machines differ, the command waits for the next one.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.run_folder.overview import Overview, overview
from narvl_jax.terminal.activity import format_duration
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import brief, escape, show

_MOST_RUNS = 1000
_LONGEST_ERROR = 300
_PIPE_WIDTH = 100
_THREADS = 16
# Tasks of an evaluation whose first metric is shown; --json has all.
_SHOWN_TASKS = 3


def status(folders: Sequence[str]) -> list[Overview]:
  """Prints a table of the state of runs.

  Args:
    folders: run folders.

  Returns:
    The state of each run.

  Raises:
    UserError: a path is in an unknown store.
  """
  paths = [as_path(folder) for folder in folders]
  with ThreadPoolExecutor(_THREADS) as pool:
    found = list(pool.map(overview, paths))
  show(format_status(found))
  return found


def format_status(found: Sequence[Overview]) -> str:
  """Returns the table, and a line for every error of a host."""
  head = ("run", "state", "phase", "step", "loss", "updates/s", "ETA")
  head += ("goodput", "checkpoint", "evaluation", "restarts", "host")
  width = None if sys.stdout.isatty() else _PIPE_WIDTH
  rows = [head, *map(_row, found)]
  lines = format_columns(rows, left=2, width=width).splitlines()
  for run in found:
    for host, error in run.errors.items():
      lines.append(f"{run.folder} {host}: {brief(error, _LONGEST_ERROR)}")
  return "\n".join(map(escape, lines))


def _row(run: Overview) -> tuple[str, ...]:
  return (
    run.folder,
    brief(run.state, _LONGEST_ERROR),
    run.phase or "",
    "" if run.step is None else f"{run.step}/{run.steps or '?'}",
    _digits(run.loss),
    _digits(run.updates_per_second),
    "" if run.seconds_left is None else format_duration(run.seconds_left),
    "" if run.goodput is None else f"{100 * run.goodput:.1f} %",
    _checkpoint(run),
    _evaluation(run),
    str(run.restarts or ""),
    run.host or "",
  )


def _digits(value: object) -> str:
  return f"{value:.4g}" if isinstance(value, int | float) else ""


def _checkpoint(run: Overview) -> str:
  if run.checkpoint is None:
    return ""
  age = run.checkpoint["age"]
  ago = "" if age is None else f", {format_duration(max(age, 0.0))} ago"
  return f"{run.checkpoint['step']}{ago}"


def _evaluation(run: Overview) -> str:
  if run.evaluation is None:
    return ""
  first: dict[str, str] = {}
  for name, value in run.evaluation["metrics"].items():
    split_and_task = "/".join(name.split("/")[:2])
    first.setdefault(split_and_task, f"{name} {_digits(value)}")
  parts = list(first.values())[:_SHOWN_TASKS]
  return f"{run.evaluation['step']}: {', '.join(parts)}"


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_float("watch", 0.0, "Seconds between repeats; 0: print once.")
  common_flags.json()


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  path, seconds = flags.FLAGS.json, flags.FLAGS.watch
  if not 0 <= seconds < float("inf"):
    raise UserError(f"--watch={seconds:g} must be seconds, such as --watch=30")
  check_json_path(path)
  while True:
    found = status(argv[1:])
    write_report(path, {"runs": [dataclasses.asdict(run) for run in found]})
    if not seconds:
      return
    time.sleep(seconds)


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=(1, _MOST_RUNS), positional_name="a run folder")
