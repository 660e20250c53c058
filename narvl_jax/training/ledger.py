"""Where the time of a run went."""

import contextlib
import time
from collections.abc import Callable, Iterator


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

  def elapsed(self) -> float:
    """Returns the seconds since the start."""
    return self._clock() - self.start

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Charges the time inside of the block to `name`."""
    self._charge()
    self._stack.append(name)
    try:
      yield
    finally:
      self._charge()
      self._stack.pop()

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of every stage so far."""
    self._charge()
    return dict(self._seconds)

  def table(self) -> str:
    """Returns a line per stage, with seconds and the share of the total."""
    seconds = self.seconds()
    total = sum(seconds.values())
    other = seconds.pop(self.OTHER, 0.0)
    rows = [*seconds.items(), (self.OTHER, other), ("total", total)]
    return "\n".join(
      f"  {name:<12} {value:9.1f} s {100 * value / total:6.1f} %"
      for name, value in rows
    )

  def _charge(self) -> None:
    now = self._clock()
    name = self._stack[-1]
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
    self._mark = now
