"""What a run says of itself on the terminal."""

import logging
import pathlib
import shlex
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from narvl_jax.command_line.cli import USER_ERROR_CODE
from narvl_jax.data.shards.writer import PROGRESS
from narvl_jax.data.sources import MANIFEST
from narvl_jax.errors import UserError
from narvl_jax.experiment.datasets import MixtureEntry
from narvl_jax.files.disk import explain_disk
from narvl_jax.files.paths import explain_path
from narvl_jax.hosts.distributed import explain_lost
from narvl_jax.reliability.interrupt import Terminated
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run_folder.metrics import format_bytes
from narvl_jax.terminal import progress
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import escape, show, show_error
from narvl_jax.training.setup import Setup, describe_parallelism

# Of an error that nobody expected, in the line about it.
_LONGEST_ERROR = 200
HOW_TO_RESUME = "run the same command again to resume"


def how_to_resume() -> str:
  """Returns what to do, with the command that this process was started by.

  Hosts that were numbered by hand or by a launcher must all be started again.
  """
  # Asking jax would wait for its devices.
  numbered = any(x.startswith("--process_id") for x in sys.orig_argv)
  where = ", on all hosts or by what started them" if numbered else ""
  return f"{HOW_TO_RESUME}{where}: {shlex.join(sys.orig_argv)}"


class Announcer:
  """Prints a line with the seconds since the start."""

  def __init__(self, ledger: Ledger) -> None:
    """Takes the clock."""
    self._ledger = ledger

  def __call__(self, text: str) -> None:
    """Prints a line."""
    show(f"[{self._ledger.elapsed():7.1f}s] {escape(text)}")


def describe_source(
  source: Sequence[Any], task: str, name: str, used: int, steps: int
) -> str:
  """Returns how large a source is and how much of it a run will use.

  Args:
    source: its records.
    task: that reads them.
    name: of the entry of `data.train`.
    used: examples in all steps.
    steps: of the run.
  """
  size = "endless" if is_endless(source) else f"{len(source):,} examples"
  text = f"source {name} for {task}: {size}; {steps} steps use {used:,}"
  if is_endless(source):
    return text
  return f"{text}, {used / len(source):.2f} epochs"


def used_table(
  mixture: Sequence[MixtureEntry], counters: Mapping[str, float]
) -> str:
  """Returns what training has used of each source.

  Args:
    mixture: the sources.
    counters: of `narvl_jax.data.batches.pipeline.TrainBatches`.
  """
  rows = []
  for source, task, _, name in mixture:
    epochs = f"{counters[f'{name}/epochs']:.2f}"
    rows.append(
      (
        escape(name),
        task,
        f"{counters[f'{name}/examples']:,.0f}",
        "endless" if is_endless(source) else epochs,
        f"{counters[f'{name}/bad']:,.0f}",
      )
    )
  head = ("source", "task", "examples", "epochs", "bad records")
  return format_columns([head, *rows], left=2)


def is_endless(source: Sequence[Any]) -> bool:
  """Returns whether a source makes records as they are asked for."""
  return bool(getattr(source, "endless", False))


def quiet_failed_saves() -> None:
  """Drops what libraries print about a checkpoint besides raising its error.

  When a disk is full, Orbax closes its event loop after the first array that
  cannot be written; then every other one leaves a traceback, from tensorstore's
  threads and from asyncio, or a warning that nobody waited for it, around the
  one line that tells why.
  """
  warnings.filterwarnings(
    "ignore", "coroutine .* was never awaited", RuntimeWarning
  )
  before = sys.unraisablehook

  def hook(raised: Any) -> None:
    if str(raised.exc_value) != "Event loop is closed":
      before(raised)

  sys.unraisablehook = hook
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def describe_model(setup: Setup, say: Announcer) -> None:
  """Says how large the model is and how a batch is split."""
  frozen = setup.num_frozen
  say(
    f"model {setup.num_parameters:,} parameters"
    + (f", {frozen:,} of them frozen" if frozen else "")
    + f"; state {format_bytes(setup.state_bytes_per_device)} per device"
  )
  if setup.teacher is not None:
    teacher = setup.teacher
    say(
      f"teacher {teacher.path}, step {teacher.step}:"
      f" {teacher.num_parameters:,} parameters,"
      f" {format_bytes(teacher.bytes_per_device)} per device"
    )
  say(describe_parallelism(setup))


def dry_run(setup: Setup, ledger: Ledger, say: Announcer) -> None:
  """Prints what can be known without training."""
  show("batch:")
  for name, spec in setup.batch.items():
    shape = "x".join(map(str, spec.shape))
    show(f"  {name:<13} {shape} {spec.dtype}")
  show(setup.parameter_table())
  show(setup.sharding_table())
  say("compiling the step, which takes minutes for a large model")
  with (
    jax.set_mesh(setup.mesh),
    ledger.stage("compile"),
    progress.doing("compiling the step"),
  ):
    compiled = setup.compile_step()
  memory: Any = compiled.memory_analysis()
  arguments = format_bytes(memory.argument_size_in_bytes)
  temporaries = format_bytes(memory.temp_size_in_bytes)
  say(f"memory per device: arguments {arguments}, temporaries {temporaries}")
  say(f"{setup.step_flops():.3g} FLOPs per step; dry run, nothing was written")


def explain_failure(
  error: BaseException, workdir: pathlib.Path
) -> tuple[int, str]:
  """Returns the exit code and the last line of a run that failed.

  What nobody expected is printed as a traceback.
  """
  code, message = describe_failure(error, workdir)
  if code == 1 and explain_lost(error) is None:
    show_error(type(error), error, error.__traceback__)
  return code, message


def describe_failure(
  error: BaseException, workdir: pathlib.Path
) -> tuple[int, str]:
  """Returns the same as `explain_failure`, and prints nothing."""
  if isinstance(error, UserError):
    return USER_ERROR_CODE, f"error: {' '.join(str(error).split())}"
  if isinstance(error, Terminated) and not error.unsaved:
    return 0, f"SIGTERM: stopped; {how_to_resume()}"
  if isinstance(error, KeyboardInterrupt):
    name, number = "SIGINT", signal.SIGINT
    if isinstance(error, Terminated):
      name, number = "second SIGTERM", signal.SIGTERM
    return 128 + number, f"{name}: stopped; {how_to_resume()}"
  disk = explain_disk(error, workdir)
  if disk is not None:
    return USER_ERROR_CODE, f"error: {disk}, then {HOW_TO_RESUME}"
  place = explain_path(error)
  if place is not None:
    return USER_ERROR_CODE, f"error: {place}"
  lost = explain_lost(error)
  if lost is not None:
    return 1, f"failed: {lost}; {HOW_TO_RESUME}"
  what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
  if len(what) > _LONGEST_ERROR:
    what = what[: _LONGEST_ERROR - 3] + "..."
  if not _holds_results(workdir):
    return 1, f"failed: {what}; nothing was saved yet in {workdir}"
  return 1, (
    f"failed: {what}; what was saved in {workdir} is intact; mend the cause,"
    f" then {HOW_TO_RESUME}"
  )


def _holds_results(folder: pathlib.Path) -> bool:
  """Returns whether a command has saved anything that it can resume from.

  Checkpoints of a run, or of runs in it; shards of data sets in it.
  """
  patterns = ("checkpoints/[0-9]*", "*/checkpoints/[0-9]*", f"*/{PROGRESS}/*")
  finished = f"*/{MANIFEST}"
  return any(
    next(folder.glob(pattern), None) is not None
    for pattern in (*patterns, finished)
  )
