"""Traces of updates by `jax.profiler`."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, Self

import jax

from narvl_jax.files.stores import as_path
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.reliability.trace_request import TraceRequest
from narvl_jax.terminal.text import show

FOLDER = "traces"
# Updates of a requested trace where `config.profile.steps` is 0.
_REQUESTED_UPDATES = 5
# In the ledger.
_STAGE = "trace"


class Traces:
  """Starts and ends traces around updates.

  A trace contains whole updates: it starts and ends when the devices are idle.
  Each host writes its own file. An error of the profiler does not end the run:
  the first one is reported, and no further trace is made.
  """

  def __init__(
    self,
    settings: Any,
    workdir: pathlib.Path,
    request: TraceRequest,
    ledger: Ledger,
    say: Callable[[str], Any] = show,
  ) -> None:
    """Prepares the traces.

    Args:
      settings: `config.profile`.
      workdir: the run folder.
      request: traces that are requested during the run.
      ledger: measures the time that traces take.
      say: prints a line.
    """
    self._settings = settings
    folder = settings.dir
    self._folder = as_path(folder) if folder else workdir / FOLDER
    self._request = request
    self._ledger = ledger
    self._say = say
    self._updates = 0
    self._failed = False
    # Of the current trace: updates to come, its first and last one.
    self._left = self._first = self._last = 0

  def before(self, step: int, pending: Any) -> None:
    """Starts a trace with the update `step` if one is due.

    Args:
      step: the next update.
      pending: arrays of the update before it.

    Raises:
      HostsLost: see `TraceRequest.due`.
    """
    self._updates += 1
    updates = self._scheduled()
    requested = self._request.due()
    if requested is not None:
      updates = requested or self._settings.steps or _REQUESTED_UPDATES
    if not updates or self._left or self._failed:
      return
    self._wait(pending)
    with self._ledger.stage(_STAGE):
      self._start(step, updates)

  def after(self, step: int, pending: Any) -> None:
    """Ends the trace if `step`, with the arrays `pending`, is its last one."""
    if not self._left:
      return
    self._last = step
    self._left -= 1
    if not self._left:
      self._wait(pending)
      with self._ledger.stage(_STAGE):
        self._end()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    """Ends a trace that the end of the loop cuts short."""
    # No stage of the ledger: it would hide the stage of an error.
    if self._left:
      self._left = 0
      self._end()

  def _scheduled(self) -> int:
    """Returns the length of a trace that the config starts here, 0 for none."""
    settings = self._settings
    passed = self._updates - settings.start_step
    every = settings.every
    due = passed == 0 or (every and passed > 0 and passed % every == 0)
    return settings.steps if due else 0

  def _wait(self, arrays: Any) -> None:
    with self._ledger.stage("step"):
      jax.block_until_ready(arrays)

  def _start(self, step: int, updates: int) -> None:
    try:
      options = jax.profiler.ProfileOptions()
      # Calls of Python functions would slow the update and fill the trace.
      options.python_tracer_level = 0
      # Not in the run folder, which may be a bucket.
      self._temporary = tempfile.TemporaryDirectory(prefix="narvl_jax_trace_")
      jax.profiler.start_trace(self._temporary.name, profiler_options=options)
    except Exception as error:
      self._fail(error)
    else:
      self._left, self._first = updates, step

  def _end(self) -> None:
    try:
      jax.profiler.stop_trace()
      folder = self._write()
    except Exception as error:
      self._fail(error)
      return
    self._say(
      f"trace of updates {self._first} to {self._last}: {folder}; open it with"
      f" xprof --logdir={folder} or tensorboard --logdir={folder}"
    )

  def _write(self) -> pathlib.Path:
    """Moves the trace into its folder, under the number of this host."""
    folder = self._folder / f"step_{self._first}"
    target = folder / "plugins" / "profile" / folder.name
    target.mkdir(parents=True, exist_ok=True)
    with self._temporary as temporary:
      # The profiler names it after the machine, which may run several hosts.
      (found,) = pathlib.Path(temporary).rglob("*.xplane.pb")
      name = f"host_{jax.process_index():03d}.xplane.pb"
      (target / name).write_bytes(found.read_bytes())
    return folder

  def _fail(self, error: Exception) -> None:
    self._failed = True
    text = " ".join(str(error).split())[:200]
    self._say(f"note: no more traces: {type(error).__name__}: {text}")
