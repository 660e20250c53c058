"""Ends a run that makes no progress, and writes the stacks of its threads."""

import contextlib
import datetime
import faulthandler
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, TextIO

from narvl_jax.files.stores import is_remote
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.terminal.text import show

STACKS_FOLDER = "stacks"
# EX_TEMPFAIL: schedulers may try again.
HANG_CODE = 75
LOOK_SECONDS = 2.0
# Delay of a check after which C code ends the process instead.
_GRACE_SECONDS = 60.0
# Time limit for a store to take the stacks.
_PUT_SECONDS = 20.0
# Stages of the ledger whose budget has another name.
_NAMES = {"init": "start", "import": "start", "data wait": "data_wait"}


class Hang(NamedTuple):
  """A stage that exceeded its budget.

  Attributes:
    stage: name in the ledger.
    seconds: since the last progress.
    name: name of the budget, a key of `config.watchdog`.
    budget: budget in seconds.
  """

  stage: str
  step: int
  seconds: float
  name: str
  budget: float

  def __str__(self) -> str:
    return (
      f'no progress for {self.seconds:.0f} s in phase "{self.stage}" at step'
      f" {self.step} (--config.watchdog.{self.name}={self.budget:g})"
    )


class Watchdog:
  """A thread that checks whether the ledger advances.

  A thread that never releases Python's lock blocks this one too. For that case
  `faulthandler`, rearmed at every check, prints the stacks and ends the
  process from C code.
  """

  def __init__(
    self,
    ledger: Ledger,
    budgets: Mapping[str, float],
    *,
    on_hang: Callable[[Hang], Any],
    on_look: Callable[[], Any] = lambda: None,
    look_seconds: float = LOOK_SECONDS,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Prepares the thread.

    Args:
      budgets: `config.watchdog`: phase -> seconds, 0 for no limit.
      on_hang: called in the thread; if it returns, watching continues.
      on_look: called at every check.
      look_seconds: between two checks.
    """
    self._ledger = ledger
    self._budgets = dict(budgets)
    self._on_hang = on_hang
    self._on_look = on_look
    self._look_seconds = look_seconds
    self._clock = clock
    self._status = ledger.status
    self._still = 0.0
    self._last_look = clock()
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> Self:
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
    if threading.current_thread() is not self._thread:
      self._thread.join(timeout=self._look_seconds + 5)
    faulthandler.cancel_dump_traceback_later()

  def look(self) -> Hang | None:
    """Returns the stage that exceeds its budget; None if there is none."""
    now = self._clock()
    # While this thread did not run, as in a machine that was suspended, the
    # others could not run either.
    passed = min(now - self._last_look, 3 * self._look_seconds)
    self._last_look = now
    status = self._ledger.status
    if status != self._status:
      self._status, self._still = status, 0.0
    else:
      self._still += passed
    name, budget = self._budget(status.stage)
    if not budget or self._still <= budget:
      return None
    return Hang(status.stage, status.step, self._still, name, budget)

  def _budget(self, stage: str) -> tuple[str, float]:
    name = _NAMES.get(stage, stage)
    name = name if name in self._budgets else "other"
    return name, self._budgets[name]

  def _watch(self) -> None:
    while not self._closed.wait(self._look_seconds):
      hang = self.look()
      if hang is not None:
        self._on_hang(hang)
        self._still = 0.0
      self._arm()
      self._on_look()

  def _arm(self) -> None:
    _, budget = self._budget(self._status.stage)
    if budget:
      left = budget - self._still + _GRACE_SECONDS
      faulthandler.dump_traceback_later(left, exit=True, file=2)
    else:
      faulthandler.cancel_dump_traceback_later()


def write_stacks(workdir: pathlib.Path, host: int, why: str) -> str:
  """Writes the stacks of all threads; returns the file, otherwise "stderr"."""
  moment = datetime.datetime.now(datetime.UTC)
  name = f"host_{host:03d}_{moment:%Y%m%dT%H%M%S}.txt"
  path = workdir / STACKS_FOLDER / name
  if is_remote(path):
    return _put_stacks(path, why)
  try:
    # A removed run folder is not created again.
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
      _dump(file, why)
  except OSError:
    faulthandler.dump_traceback(2, all_threads=True)
    return "stderr"
  return str(path)


def _dump(file: TextIO, why: str) -> None:
  file.write(f"{why}\nprocess {os.getpid()}: {' '.join(sys.argv)}\n\n")
  file.flush()
  faulthandler.dump_traceback(file, all_threads=True)


def _put_stacks(path: pathlib.Path, why: str) -> str:
  """Writes the stacks to a store, which may be what hangs."""
  with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
    _dump(file, why)
    file.seek(0)
    text = file.read()
  written: list[str] = []

  def put() -> None:
    with contextlib.suppress(OSError):
      path.write_text(text)
      written.append(str(path))

  thread = threading.Thread(target=put, daemon=True)
  thread.start()
  thread.join(_PUT_SECONDS)
  if not written:
    show(text, file=sys.stderr)
  return written[0] if written else "stderr"
