"""Stopping a run between two steps."""

import signal
from types import FrameType
from typing import Any, Self


class StopRequest:
  """Remembers Ctrl-C or SIGTERM, so that a run ends with a checkpoint.

  The first signal sets `signal_number`; a second Ctrl-C interrupts at once.
  """

  def __init__(self) -> None:
    self.signal_number: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Self:
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.signal_number is not None:
      raise KeyboardInterrupt
    self.signal_number = number
    name = signal.Signals(number).name
    print(f"{name}: stopping after this step; once more to stop at once")
