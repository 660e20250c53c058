"""The time of a run, divided among its stages."""

import collections
import contextlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from narvl_jax.run_folder.goodput import STALL
from narvl_jax.terminal.tables import format_columns

# An update that takes longer than both is a stall from there on: a multiple of
# the median of the last updates, and seconds.
_STALL_FACTOR = 10.0
_STALL_SECONDS = 5.0
_RECENT_UPDATES = 50


class RunStatus(NamedTuple):
  """The current activity of a run.

  Attributes:
    stage: the innermost stage.
    step: the last update that was begun.
    moves: count of progress events: start and end of a stage, an update, a
      batch of an evaluation.
  """

  stage: str
  step: int
  moves: int


class Ledger:
  """Divides the time since its start among stages, without gap or overlap.

  The time of an inner stage does not count for the outer one. Time outside of
  every stage is "other", so the shares add up to 100 %. The part of an update
  that is far longer than usual is "stall". Thread-safe.
  """

  OTHER = "other"

  def __init__(
    self,
    start: float | None = None,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Starts the ledger.

    Args:
      start: start of the process on `clock`; the time since then is "import".
    """
    self._clock = clock
    now = clock()
    self.start = now if start is None else start
    self._seconds: dict[str, float] = {"import": now - self.start}
    self._stack = [self.OTHER]
    self._mark = now
    self._step = self._from_step = self._updates = 0
    self._update_seconds = collections.deque[float](maxlen=_RECENT_UPDATES)
    self._update_start = 0.0
    self._moves = 0
    self._broken: str | None = None
    self._guard = threading.Lock()

  def elapsed(self) -> float:
    """Returns the seconds since the start."""
    return self._clock() - self.start

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Charges the time of the block to `name`, its name in a trace too."""
    self._charge()
    self._stack.append(name)
    self._moves += 1
    self._broken = None
    try:
      with jax.profiler.TraceAnnotation(name):
        yield
    except BaseException:
      # The failed stage stays the status until another one begins.
      self._broken = self._broken or name
      raise
    finally:
      self._charge()
      self._stack.pop()
      self._moves += 1

  def progress(self, step: int | None = None) -> None:
    """Records progress: the start of update `step`, or a part of a stage."""
    self._moves += 1
    if step is not None:
      self._step = step
      self._updates += 1
      self._end_update()

  def resume(self, step: int) -> None:
    """Records that updates begin after `step`."""
    self._step = self._from_step = step
    self._moves += 1

  @property
  def status(self) -> RunStatus:
    """The current activity of the run, or that at its failure; thread-safe."""
    stage = self._broken or self._stack[-1]
    return RunStatus(stage, self._step, self._moves)

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of every stage so far."""
    with self._guard:
      seconds = dict(self._seconds)
      now, stage = self._clock(), self._stack[-1]
      seconds[stage] = seconds.get(stage, 0.0) + now - self._mark
      self._move_stall(seconds)
    return seconds

  def account(self) -> dict[str, Any]:
    """Returns what `time.jsonl` records of a process.

    Returns:
      "from_step", the step that was resumed, "step", "updates", which repeated
      ones exceed, and "seconds" of every stage.
    """
    seconds = {name: round(x, 3) for name, x in self.seconds().items()}
    return {
      "from_step": self._from_step,
      "step": self._step,
      "updates": self._updates,
      "seconds": seconds,
    }

  def table(self) -> str:
    """Returns a line per stage with seconds and share; shares sum to 100.0."""
    seconds = self.seconds()
    seconds[self.OTHER] = seconds.pop(self.OTHER, 0.0)
    shares = _rounded_shares(list(seconds.values()))
    rows = [
      (name, f"{value:.1f} s", f"{share / 10:.1f} %")
      for (name, value), share in zip(seconds.items(), shares, strict=True)
    ]
    rows.append(("total", f"{sum(seconds.values()):.1f} s", "100.0 %"))
    return format_columns(rows, rule=False, indent="  ")

  def _charge(self) -> None:
    with self._guard:
      now, name = self._clock(), self._stack[-1]
      self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
      self._mark = now

  def _end_update(self) -> None:
    self._charge()
    with self._guard:
      spent = self._seconds.get("step", 0.0) - self._update_start
      self._move_stall(self._seconds)
      # The first call is the start of an update, not yet the end of one.
      if self._updates > 1:
        self._update_seconds.append(spent)
      self._update_start = self._seconds.get("step", 0.0)

  def _move_stall(self, seconds: dict[str, float]) -> None:
    """Moves the part of the update that is longer than usual to "stall"."""
    if not self._update_seconds:
      return
    usual = _STALL_FACTOR * statistics.median(self._update_seconds)
    spent = seconds.get("step", 0.0) - self._update_start
    stall = spent - max(usual, _STALL_SECONDS)
    if stall > 0:
      seconds["step"] -= stall
      seconds[STALL] = seconds.get(STALL, 0.0) + stall


def _rounded_shares(values: Sequence[float]) -> list[int]:
  """Returns shares in thousandths that sum to 1000 (largest remainders)."""
  total = sum(values) or 1.0
  exact = [1000 * value / total for value in values]
  shares = [math.floor(share) for share in exact]
  by_remainder = sorted(range(len(values)), key=lambda i: shares[i] - exact[i])
  for i in by_remainder[: 1000 - sum(shares)]:
    shares[i] += 1
  return shares
