"""Stop requests, lock and watchdog of a run, and how its process ends."""

import contextlib
import functools
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

from narvl_jax.checkpointing.writing import FOLDER as CHECKPOINTS
from narvl_jax.errors import UserError
from narvl_jax.files import leftovers
from narvl_jax.hosts.host_times import HostTimes
from narvl_jax.hosts.notices import Notices
from narvl_jax.reliability import watchdog
from narvl_jax.reliability.explain import (
  HOW_TO_RESUME,
  describe_failure,
  how_to_resume,
  stopped_code,
)
from narvl_jax.reliability.interrupt import StopRequest
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.reliability.trace_request import TraceRequest
from narvl_jax.run_folder import restarts, times
from narvl_jax.run_folder.goodput import Goodput, goodput
from narvl_jax.run_folder.lock import (
  LockLost,
  RunLock,
  now,
  renew_seconds,
)
from narvl_jax.run_folder.workdir import is_run
from narvl_jax.terminal.text import show

# Seconds at the end of the process for a checkpoint that is being written.
_SAVE_SECONDS = 600.0


class Guard:
  """Guards a run from the start of its process to the end.

  Attributes:
    stop: Ctrl-C and SIGTERM.
    trace: requests for a trace.
    times: seconds of the updates of all hosts; None for one process.
    busy: returns whether a checkpoint is being written; set by the caller.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    ledger: Ledger,
    *,
    leave: Callable[[int], Any] | None = None,
  ) -> None:
    """Prepares the guard.

    Args:
      leave: ends the process with an exit code, even if threads are running;
        None leaves that to the main thread, as in a notebook.
    """
    self.ledger = ledger
    self.stop = StopRequest()
    self.trace = TraceRequest(workdir)
    self.times: HostTimes | None = None
    self.busy: Callable[[], bool] = lambda: False
    self._workdir = workdir
    self._leave = leave
    self._notices: Notices | None = None
    self._lock: RunLock | None = None
    self._since: str | None = None
    # Times of the earlier processes, once they were read.
    self._earlier: list[dict[str, Any]] | None = None
    self._watchdog: watchdog.Watchdog | None = None
    self._renewed = 0.0
    self._renewing = threading.Lock()
    self._lost = ""
    self._stacks = ""
    self._ending = threading.RLock()
    self._ended = False

  def __enter__(self) -> Self:
    self.stop.busy = lambda: self.busy()
    if self._leave is not None:
      self.stop.leave = lambda error: self._end_process(
        *describe_failure(error, self._workdir)
      )
    self.stop.__enter__()
    self.trace.__enter__()
    return self

  def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
    if self._watchdog is not None:
      self._watchdog.__exit__()
    if error is not None and not isinstance(error, SystemExit):
      self.end(*describe_failure(error, self._workdir))
    else:
      self._release()
    self.trace.__exit__()
    # The exit code is decided; a launcher's SIGTERM must not change it.
    self.stop.close(ignore=error is not None and self._leave is not None)

  def connect(self, notices: Notices | None) -> None:
    """Sets the notices between hosts; None for a run of one process."""
    self._notices = self.stop.notices = notices
    if notices is not None:
      notices.stage = lambda: self.ledger.status.stage
      self.trace.agreement = notices.trace
      self.times = notices.times

  def watch(self, budgets: Mapping[str, float]) -> None:
    """Starts the watchdog with the budgets of `config.watchdog`."""
    self._watchdog = watchdog.Watchdog(
      self.ledger,
      budgets,
      on_hang=self._hang,
      on_look=self._renew,
      look_seconds=watchdog.LOOK_SECONDS,
    )
    self._watchdog.__enter__()

  def lock_folder(self, say: Callable[[str], Any]) -> None:
    """Locks the run folder, on the first host.

    Raises:
      UserError: another run is alive in it.
    """
    lock = RunLock(self._workdir)
    lock.acquire(
      say,
      functools.partial(restarts.record_death, self._workdir),
      self.ledger.status.stage,
    )
    self._lock, self._since = lock, lock.since
    leftovers.remove_below(self._workdir)

  def record_restart(
    self,
    step: int,
    say: Callable[[str], Any],
    *,
    saved: float | None = None,
    damaged: Sequence[str] = (),
  ) -> None:
    """Records the previous end of the run; see `run_folder.restarts`.

    Args:
      step: the step that is resumed.
      saved: Unix time of its checkpoint; by default that of its folder.
      damaged: damage of newer checkpoints, a line each.
    """
    if saved is None and step:
      with contextlib.suppress(OSError):
        saved = (self._workdir / CHECKPOINTS / str(step)).stat().st_mtime
    for record in restarts.record_restart(
      self._workdir, step=step, saved=saved, damaged=damaged
    ):
      say(f"restart: {restarts.describe(record)}")

  def goodput(self) -> Goodput:
    """Returns the goodput of all processes of the run up to now."""
    if self._earlier is None:
      self._earlier = []
      with contextlib.suppress(OSError):
        self._earlier = times.history(self._workdir)
    account = {"time": now(), **self.ledger.account()}
    return goodput([*self._earlier, account])

  def stopped(self, step: int) -> NoReturn:
    """Ends a run after a stop request; the state of `step` is on disk."""
    number = self.stop.signal_number or signal.SIGTERM
    # SIGTERM requests a save and an end, so it succeeded; Ctrl-C interrupts.
    code = 0 if number == signal.SIGTERM else 128 + number
    why = f"{signal.Signals(number).name}: stopped"
    show(f"{why} at step {step}; {how_to_resume()}")
    self.end(code, why)
    sys.exit(code or stopped_code())

  def end(self, code: int, message: str) -> None:
    """Records once that the run ends unfinished; thread-safe.

    Args:
      code: exit code; 0 first waits for a checkpoint that is being written.
      message: the reason, in one line.
    """
    with self._ending:
      if self._ended:
        return
      self._ended = True
    if code == watchdog.HANG_CODE and not self._stacks:
      self._stacks = self._write_stacks(message)
    deadline = time.monotonic() + _SAVE_SECONDS
    while code == 0 and self.busy() and time.monotonic() < deadline:
      time.sleep(0.1)
    if self._lock is None:
      return
    status = self.ledger.status
    restarts.record_end(
      self._workdir,
      # The advice is not recorded.
      message.split("; ")[0],
      code=code,
      stage=None if status.stage == Ledger.OTHER else status.stage,
      step=status.step,
      since=self._since,
    )
    self._release()

  def _release(self) -> None:
    """Records the time if the folder contains a run, and unlocks it; once."""
    with self._ending:
      # Another thread may set it to None.
      lock, self._lock = self._lock, None
    if lock is None:
      return
    with contextlib.suppress(OSError):
      if is_run(self._workdir):
        times.record(self._workdir, self.ledger.account())
    lock.release()

  def check_folder(self) -> None:
    """Checks on the first host that the folder still belongs to this run.

    Otherwise a write would recreate a removed folder with a part of a run.

    Raises:
      LockLost: the folder no longer exists, or another run has taken it over.
    """
    with self._renewing:
      self._sign()
      if self._lost:
        raise LockLost(self._lost)

  def _sign(self) -> None:
    """Renews the lock if this host has it, and notes its loss."""
    lock = self._lock
    if lock is None:
      return
    status = self.ledger.status
    try:
      lock.renew(status.stage, status.step, self.ledger.account())
    except LockLost as error:
      # Not the error itself: its frames would keep the state alive.
      self._lock, self._lost = None, str(error)

  def _renew(self) -> None:
    """Renews the lock and looks for requests, every `renew_seconds`."""
    lock = self._lock
    if lock is None:
      return
    every = renew_seconds(self._workdir)
    if time.monotonic() < self._renewed + every:
      return
    self._renewed = time.monotonic()
    if lock.in_store:
      # A store that is slow must not stop the watchdog.
      threading.Thread(target=self._renew_now, daemon=True).start()
    else:
      self._renew_now()

  def _renew_now(self) -> None:
    if not self._renewing.acquire(blocking=False):
      # The main thread renews it. If its disk hangs, the watchdog continues.
      return
    # Locked while the process ends, so that no save begins.
    try:
      if self._lock is None:
        # The main thread noticed first and reports it.
        return
      self._sign()
      if self._lost:
        error = LockLost(self._lost)
        self._end_process(*describe_failure(error, self._workdir))
        return
      self.trace.look()
    finally:
      self._renewing.release()

  def _hang(self, hang: watchdog.Hang) -> None:
    self._stacks = self._write_stacks(f"watchdog: {hang}")
    message = (
      f"watchdog: {hang}; stacks of all threads in {self._stacks};"
      f" {HOW_TO_RESUME}"
    )
    self._end_process(watchdog.HANG_CODE, message)

  def _write_stacks(self, why: str) -> str:
    # `jax.process_index` would first wait for the devices.
    host = 0 if self._notices is None else self._notices.host
    return watchdog.write_stacks(self._workdir, host, why)

  def _end_process(self, code: int, message: str) -> None:
    """Ends this process and the other hosts; called by a thread."""
    if self._notices is not None:
      self._notices.fail(code, message)
      return
    with contextlib.suppress(OSError, ValueError):
      show(message, file=sys.stderr)
    if self._leave is not None:
      self.end(code, message)
      self._leave(code)


def check_unchanged(resumes: bool, workdir: pathlib.Path) -> None:
  """Checks that no other run began while this one waited for the lock.

  Args:
    resumes: whether the folder contained a run when the config was compared.
    workdir: the run folder, locked by this run.

  Raises:
    UserError: the answer has changed.
  """
  if is_run(workdir) != resumes:
    raise UserError(
      f"--workdir={workdir}: another run began and ended in the meantime;"
      " start this one again"
    )
