"""An activity that takes time: its progress, as text and as a bar."""

import collections
import time
from collections.abc import Callable
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from narvl_jax.terminal.text import escape

# The rate is an average over this time.
_WINDOW_SECONDS = 30.0
_BAR_WIDTHS = (8, 30)
_FEWEST_TEXT = 10


class Activity:
  """An activity that takes time.

  Attributes:
    text: description, such as "compiling the step".
    total: amount of work; None if unknown.
    unit: unit of `total`, such as "examples"; "bytes" are shown as sizes.
    done: finished part of `total`.
  """

  def __init__(
    self,
    text: str,
    total: int | None = None,
    unit: str = "",
    *,
    done: int = 0,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Starts the clock; see the attributes."""
    self.text = " ".join(escape(text).split())
    self.total, self.unit = total, unit
    self.done = done
    self._expected_end: float | None = None
    self._at_least = False
    self._clock = clock
    self._start = clock()
    self._samples = collections.deque([(self._start, done)])

  def advance(self, count: int = 1) -> None:
    """Adds to `done`; as cheap as an addition."""
    self.done += count

  def expect(self, seconds: float | None, *, at_least: bool = False) -> None:
    """Sets the remaining time, where a better estimate than the rate is known.

    Args:
      seconds: from now; None estimates from the recent rate.
      at_least: whether it may take longer, which is shown as `>45s left`.
    """
    self._at_least = at_least
    end = None if seconds is None else self._clock() + seconds
    self._expected_end = end

  def elapsed(self) -> float:
    """Returns the seconds since the start."""
    return self._clock() - self._start

  def rate(self) -> float:
    """Returns the recent amount per second; to be called regularly."""
    now = self._clock()
    if now - self._samples[-1][0] >= 1:
      self._samples.append((now, self.done))
    while len(self._samples) > 2 and now - self._samples[0][0] > (
      _WINDOW_SECONDS
    ):
      self._samples.popleft()
    before, done = self._samples[0]
    return (self.done - done) / max(now - before, 1e-9)

  def progress(self, *, short: bool = False) -> str:
    """Returns text such as `1,200/4,000 examples  30 %  45s left`."""
    if self.total is None:
      done = f"{_count(self.done, self.unit)}, " if self.done else ""
      return f"{done}{format_duration(self.elapsed())}"
    parts = [f"{100 * self.done // max(self.total, 1)} %"]
    if not short:
      counts = f"{_plain(self.done, self.unit)}/{_count(self.total, self.unit)}"
      parts.insert(0, counts)
    rate, left = self.rate(), None
    if self._expected_end is not None:
      left = max(self._expected_end - self._clock(), 0.0)
    elif rate > 0 and self.done < self.total:
      left = (self.total - self.done) / rate
    if left is not None:
      more = ">" * (self._at_least and self._expected_end is not None)
      parts.append(f"{more}{format_duration(left)} left")
    else:
      parts.append(format_duration(self.elapsed()))
    return "  ".join(parts)

  def line(self) -> str:
    """Returns a plain line, such as `reading: 30/100 records  30 %`."""
    rate, text = self.rate(), f"{self.text}: {self.progress()}"
    if self.total is None or not rate:
      return text
    return f"{text}, {_rate(rate, self.unit)}"


def format_duration(seconds: float) -> str:
  """Returns a duration such as `2h05m`, `3m20s` or `7s`."""
  seconds = round(seconds)
  if seconds >= 3600:
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
  if seconds >= 60:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  return f"{seconds}s"


def _plain(count: float, unit: str) -> str:
  return f"{count / 1e6:,.1f}" if unit == "bytes" else f"{count:,.0f}"


def _count(count: float, unit: str) -> str:
  name = "MB" if unit == "bytes" else unit
  return f"{_plain(count, unit)} {name}".rstrip()


def _rate(rate: float, unit: str) -> str:
  if unit == "bytes" or rate >= 100:
    return f"{_count(rate, unit)}/s"
  return f"{rate:,.1f} {unit}/s"


def drawn(activity: Activity, width: int) -> Table:
  """Returns an activity as one line of at most `width` columns.

  A narrow line omits the counts first, then the bar, then the end of the text.
  """
  text, tail = activity.text, activity.progress()
  room = width - cell_len(text) - len(tail) - 2
  if room < _BAR_WIDTHS[0]:
    tail = activity.progress(short=True)
    room = width - cell_len(text) - len(tail) - 2
  if room < -1:
    text = _cut(text, max(width - len(tail) - 1, _FEWEST_TEXT))
    tail = _cut(tail, max(width - cell_len(text) - 1, 0))
  cells: list[Any] = [Text(text), Text(tail, style="cyan")]
  bar_width = min(room, _BAR_WIDTHS[1])
  if activity.total is not None and bar_width >= _BAR_WIDTHS[0]:
    bar = ProgressBar(max(activity.total, 1), activity.done, width=bar_width)
    cells.insert(1, bar)
  grid = Table.grid(padding=(0, 1, 0, 0))
  for _ in cells:
    grid.add_column(no_wrap=True)
  grid.add_row(*cells)
  return grid


def _cut(text: str, width: int) -> str:
  """Returns the start of a text that fits."""
  if cell_len(text) <= width:
    return text
  return set_cell_size(text, max(width - 2, 0)).rstrip() + ".."[:width]
