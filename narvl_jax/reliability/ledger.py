"""Where the time of a run went."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class RunStatus(NamedTuple):
  """What a run is doing, as other threads see it.

  Attributes:
    stage: the innermost one.
    step: the last update that was begun.
    moves: grows with every sign of progress: a stage that begins or ends, an
      update, a batch of an evaluation.
  """

  stage: str
  step: int
  moves: int


class Ledger:
  """Splits the time since its start among stages, without gap or overlap.

  Stages nest: the time of an inner stage does not count for the outer one.
  Time outside of every stage is "other", so the shares add up to 100 %.
  """

  OTHER = "other"

  def __init__(
    self,
    start: float | None = None,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Starts the ledger.

    Args:
      start: beginning of the run on `clock`, now by default; what lies before
        the first stage is "import".
      clock: returns seconds.
    """
    self._clock = clock
    now = clock()
    self.start = now if start is None else start
    self._seconds: dict[str, float] = {"import": now - self.start}
    self._stack = [self.OTHER]
    self._mark = now
    self._step = 0
    self._moves = 0
    self._broken: str | None = None

  def elapsed(self) -> float:
    """Returns the seconds since the start."""
    return self._clock() - self.start

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Charges the time inside of the block to `name`."""
    self._charge()
    self._stack.append(name)
    self._moves += 1
    self._broken = None
    try:
      yield
    except BaseException:
      # What it raised says where the run was, unless another stage follows.
      self._broken = self._broken or name
      raise
    finally:
      self._charge()
      self._stack.pop()
      self._moves += 1

  def progress(self, step: int | None = None) -> None:
    """Says that the run moves on.

    Args:
      step: the update that was just begun; None: something within it, such
        as a batch of an evaluation.
    """
    self._moves += 1
    if step is not None:
      self._step = step

  @property
  def status(self) -> RunStatus:
    """What the run is doing, or was when it failed; any thread may ask."""
    stage = self._broken or self._stack[-1]
    return RunStatus(stage, self._step, self._moves)

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of every stage so far."""
    self._charge()
    return dict(self._seconds)

  def table(self) -> str:
    """Returns a line per stage, with seconds and the share of the total.

    The shares add up to 100.0 as they are printed.
    """
    seconds = self.seconds()
    other = seconds.pop(self.OTHER, 0.0)
    rows = {**seconds, self.OTHER: other}
    shares = _rounded_shares(list(rows.values()))
    total = ("total", sum(rows.values()), 1000)
    return "\n".join(
      f"  {name:<12} {value:9.1f} s {share / 10:6.1f} %"
      for name, value, share in [
        *zip(rows, rows.values(), shares, strict=True),
        total,
      ]
    )

  def _charge(self) -> None:
    now = self._clock()
    name = self._stack[-1]
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
    self._mark = now


def _rounded_shares(values: Sequence[float]) -> list[int]:
  """Returns the shares in thousandths, rounded so that they add up to 1000."""
  total = sum(values) or 1.0
  exact = [1000 * value / total for value in values]
  shares = [math.floor(share) for share in exact]
  # The largest remainders are rounded up.
  by_remainder = sorted(range(len(values)), key=lambda i: shares[i] - exact[i])
  for i in by_remainder[: 1000 - sum(shares)]:
    shares[i] += 1
  return shares
