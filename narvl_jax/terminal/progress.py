"""Progress of a command on stderr.

On a terminal the last line is redrawn several times a second and removed at the
end. Elsewhere, such as in a log, plain lines follow at growing intervals, the
first after ten seconds. Nothing is written to stdout, which is for results.

    with progress.doing("compiling the step"):
      compiled = lowered.compile()
    with progress.doing("reading", len(records), "records") as reading:
      for record in records:
        ...
        reading.advance()

A thread draws until the end of the block; the block itself only counts.
"""

import contextlib
import io
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from absl import logging
from rich.console import Console

from narvl_jax.terminal.activity import Activity, drawn
from narvl_jax.terminal.text import show

# Start of plain lines, by which logs can be searched or filtered.
LINE_START = "progress: "
_DRAW_SECONDS = 0.25
# Bounds of the time between two plain lines, which is the time so far.
_GAPS = (10.0, 60.0)


class _Display:
  """Shows the innermost of the activities in progress."""

  def __init__(
    self,
    stream: TextIO,
    *,
    live: bool,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    self._stream = stream
    self._console = Console(file=stream, highlight=False) if live else None
    self._clock = clock
    self._lock = threading.RLock()
    self._activities: list[Activity] = []
    self._start = clock()
    self._next_line = self._start + _GAPS[0]
    # Whether the last line of the terminal is ours, or an unfinished line of
    # other output.
    self._drawn = self._line_open = False
    self._broken = False
    self._ended = threading.Event()

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Draws until the end of the block."""
    thread = threading.Thread(
      target=self._draw_often, name="progress", daemon=True
    )
    live = self._console is not None
    with self._others_above() if live else contextlib.nullcontext():
      thread.start()
      try:
        yield
      finally:
        self._ended.set()
        thread.join(timeout=5)
        self._write(self._clear)

  @contextlib.contextmanager
  def showing(self, activity: Activity) -> Iterator[None]:
    """Shows an activity until the end of the block."""
    self._activities.append(activity)
    try:
      yield
    finally:
      self._activities.remove(activity)

  def _draw_often(self) -> None:
    while not self._ended.wait(_DRAW_SECONDS):
      self._write(self.draw)

  def draw(self) -> None:
    """Shows the innermost activity, if a line is due."""
    for activity in self._activities[-1:]:
      if self._console is None:
        self._print_line(activity)
      elif not self._line_open:
        self._clear()
        # So that output of C++ code begins at the left.
        self._stream.write(self._rendered(activity, self._console) + "\r")
        self._stream.flush()
        self._drawn = True

  def _print_line(self, activity: Activity) -> None:
    # Called regularly, so that it is the rate of the last half minute.
    activity.rate()
    now = self._clock()
    if now < self._next_line:
      return
    shortest, longest = _GAPS
    gap = min(max(now - self._start, shortest), longest)
    self._next_line = now + gap
    show(f"{LINE_START}{activity.line()}", file=self._stream)

  def _rendered(self, activity: Activity, console: Console) -> str:
    # The last column stays free: some terminals wrap after it.
    line = drawn(activity, max(console.width - 1, 1))
    with console.capture() as capture:
      console.print(line, end="")
    return capture.get().rstrip("\n")

  def _clear(self) -> None:
    if self._drawn:
      self._stream.write("\r\x1b[2K")
      self._stream.flush()
      self._drawn = False

  def _write(self, action: Callable[[], None]) -> None:
    """Stops writing for good after an error."""
    with self._lock:
      if self._broken:
        return
      try:
        action()
      except (OSError, ValueError):
        self._broken = True

  @contextlib.contextmanager
  def _others_above(self) -> Iterator[None]:
    """Removes the bar before other output on the same terminal."""
    before = sys.stdout, sys.stderr
    above: list[Any] = [
      _Above(self, x) if x is not None and x.isatty() else x for x in before
    ]
    handler = logging.get_absl_handler().python_handler
    logged = handler.stream
    sys.stdout, sys.stderr = above
    if logged is before[1]:
      handler.setStream(above[1])
    try:
      yield
    finally:
      if logged is before[1]:
        handler.setStream(logged)
      if sys.stdout is above[0]:
        sys.stdout = before[0]
      if sys.stderr is above[1]:
        sys.stderr = before[1]

  def print_above(self, stream: TextIO, text: str) -> int:
    """Writes to a stream that shares the terminal with the bar."""
    with self._lock:
      self._write(self._clear)
      count = stream.write(text)
      stream.flush()
      if text:
        self._line_open = not text.endswith("\n")
    return count


class _Above:
  """A stream of a terminal that removes the bar before it writes."""

  def __init__(self, display: _Display, stream: TextIO) -> None:
    self._display, self._stream = display, stream

  def write(self, text: str) -> int:
    return self._display.print_above(self._stream, text)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


_display: _Display | None = None
_muted = False


@contextlib.contextmanager
def doing(
  text: str,
  total: int | None = None,
  unit: str = "",
  *,
  done: int = 0,
  only_live: bool = False,
) -> Iterator[Activity]:
  """Shows the progress of the block.

  A nested block replaces the outer one on the terminal. Nothing is shown in
  threads other than the main one, in worker processes, and without stderr.

  Args:
    text: description, such as "evaluating"; any characters.
    total: amount of work; None if unknown.
    unit: unit of `total`, such as "examples" or "bytes".
    done: part of `total` that is done already.
    only_live: whether to show nothing where there is no terminal, because the
      block prints lines itself.

  Yields:
    The activity; call its `advance`.
  """
  global _display
  activity = Activity(text, total, unit, done=done)
  terminal = terminal_of(sys.stderr)
  if not _may_show() or (only_live and terminal is None):
    yield activity
    return
  if _display is not None:
    with _display.showing(activity):
      yield activity
    return
  display = _Display(terminal or sys.stderr, live=terminal is not None)
  _display = display
  try:
    with display.showing(activity), display.running():
      yield activity
  finally:
    _display = None


@contextlib.contextmanager
def muted() -> Iterator[None]:
  """Shows nothing within the block; for all hosts but the first."""
  global _muted
  before, _muted = _muted, True
  try:
    yield
  finally:
    _muted = before


def terminal_of(stream: Any) -> TextIO | None:
  """Returns the terminal of a stream if it can redraw a line, otherwise None.

  A stream that is also logged is not a terminal. A wrapper that passes
  everything to one terminal has it as the attribute `undivided`.
  """
  stream = getattr(stream, "undivided", stream)
  if not isinstance(stream, io.TextIOWrapper) or not stream.isatty():
    return None
  return None if Console(file=stream).is_dumb_terminal else stream


def _may_show() -> bool:
  return (
    not _muted
    and sys.stderr is not None
    and threading.current_thread() is threading.main_thread()
    and multiprocessing.parent_process() is None
  )
