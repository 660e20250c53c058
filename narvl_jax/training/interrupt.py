"""Stopping a run: between two steps where it trains, else at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from narvl_jax.parallel.notices import Notices


class Terminated(KeyboardInterrupt):
  """SIGTERM, where a run has nothing to finish first."""


class StopRequest:
  """Remembers Ctrl-C or SIGTERM, so that a run ends with a checkpoint.

  The first signal sets `signal_number`; a second one interrupts at once. Of
  several hosts all stop if one is asked to, after the same step.
  """

  def __init__(self, notices: Notices | None = None) -> None:
    """Takes the notices that tell other hosts, None for a single one."""
    self._notices = notices
    self._signal_number: int | None = None
    self._previous: dict[int, Any] = {}

  @property
  def signal_number(self) -> int | None:
    """The signal that this or another host got, None before."""
    if self._notices is not None:
      return self._notices.stop_signal
    return self._signal_number

  def begin(self, step: int) -> None:
    """Says that the training loop begins with `step`."""
    if self._notices is not None:
      self._notices.agreement.begin(step)

  def due(self, step: int) -> bool:
    """Returns whether the run ends after `step`, the same on all hosts.

    To be asked once for each step.
    """
    if self._notices is not None:
      return self._notices.agreement.due(step)
    return self._signal_number is not None

  def __enter__(self) -> Self:
    # Python hands signals to the main thread only.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self._signal_number is not None:
      raise KeyboardInterrupt
    self._signal_number = number
    if self._notices is not None and self._notices.stop_signal is None:
      self._notices.stop_signal = number
    name = signal.Signals(number).name
    text = f"{name}: stopping after this step; once more to stop at once\n"
    # Not `print`: the signal may have come in the middle of another one.
    os.write(2, text.encode())


def ignore_signals() -> None:
  """Ignores Ctrl-C and SIGTERM in a process that is ending."""
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
  """Raises `Terminated` on SIGTERM, which by default ends without a word."""

  def handle(number: int, frame: FrameType | None) -> None:
    raise Terminated

  previous = signal.signal(signal.SIGTERM, handle)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)
