"""Exit code and last line of a command that failed."""

import logging
import os
import pathlib
import shlex
import signal
import sys
import warnings
from typing import Any

from narvl_jax.data.shards.writer import PROGRESS
from narvl_jax.data.sources import MANIFEST
from narvl_jax.errors import USER_ERROR_CODE, UserError
from narvl_jax.files.disk_errors import explain_disk
from narvl_jax.files.paths import explain_path
from narvl_jax.hosts.distributed import explain_lost
from narvl_jax.reliability.interrupt import Terminated
from narvl_jax.terminal.text import show_error

# Longest quotation of an unexpected error, in characters.
_LONGEST_ERROR = 200


HOW_TO_RESUME = "run the same command again to resume"
_STOPPED_CODE = "NARVL_STOPPED_CODE"


def stopped_code() -> int:
  """Returns the exit code after SIGTERM and a save.

  It is 0 unless a launcher sets NARVL_STOPPED_CODE, since its cluster would
  take a preempted run for a finished one.
  """
  text = os.environ.get(_STOPPED_CODE, "")
  return int(text) % 256 if text.isdecimal() else 0


def how_to_resume() -> str:
  """Returns the advice to run the command of this process again."""
  # All numbered hosts must be restarted. A query of jax would wait for devices.
  numbered = any(x.startswith("--process_id") for x in sys.orig_argv)
  where = ", on all hosts or by what started them" if numbered else ""
  return f"{HOW_TO_RESUME}{where}: {shlex.join(sys.orig_argv)}"


def quiet_failed_saves() -> None:
  """Silences messages of libraries about a failed save, except its error.

  On a full disk Orbax closes its event loop after the first array that cannot
  be written. Every other array then prints a traceback from tensorstore's
  threads or asyncio, or a warning about a coroutine.
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


def explain_failure(
  error: BaseException, workdir: pathlib.Path
) -> tuple[int, str]:
  """Returns exit code and last line; prints a traceback if unexpected."""
  code, message = describe_failure(error, workdir)
  if code == 1 and explain_lost(error) is None:
    show_error(type(error), error, error.__traceback__)
  return code, message


def describe_failure(
  error: BaseException, workdir: pathlib.Path
) -> tuple[int, str]:
  """Returns the exit code and the last line of a run that failed."""
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
    f"failed: {what}; what was saved in {workdir} is intact; remove the cause,"
    f" then {HOW_TO_RESUME}"
  )


def _holds_results(folder: pathlib.Path) -> bool:
  """Returns whether a folder has checkpoints or shards to resume from."""
  patterns = ("checkpoints/[0-9]*", "*/checkpoints/[0-9]*", f"*/{PROGRESS}/*")
  finished = f"*/{MANIFEST}"
  try:
    return any(
      next(folder.glob(pattern), None) is not None
      for pattern in (*patterns, finished)
    )
  except OSError:
    # A store that fails.
    return True
