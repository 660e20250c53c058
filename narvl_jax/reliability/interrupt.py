"""Stop requests: take effect after a training step, otherwise at once."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from narvl_jax.hosts.notices import Notices

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds for the main thread to end by itself; it cannot while in C++.
_PATIENCE_SECONDS = 2.0


class Terminated(KeyboardInterrupt):
  """SIGTERM that ends a run at once.

  Attributes:
    unsaved: whether steps are lost: a second signal came before the save.
  """

  def __init__(self, unsaved: bool = False) -> None:
    super().__init__()
    self.unsaved = unsaved


class EvaluationStopped(Exception):
  """An evaluation was abandoned between two batches by a stop request."""


def _error(number: int, unsaved: bool) -> KeyboardInterrupt:
  if number == signal.SIGTERM:
    return Terminated(unsaved)
  return KeyboardInterrupt()


class StopRequest:
  """Handles Ctrl-C and SIGTERM, even while the main thread is busy.

  In the training loop (from `begin` to `finish`) the first signal is a request:
  the loop saves and ends after a step, the same one on all hosts. A second
  signal interrupts at once, and so does the first one outside of the loop,
  where nothing can be lost.

  Python handles signals in the main thread, and not while that is in C++; a
  compilation in XLA may take minutes. So a thread reads the signal numbers too
  (`signal.set_wakeup_fd`) and ends the process if the main thread does not.

  Attributes:
    notices: notices between hosts; None for one process.
    busy: returns whether a write is in progress that must not be interrupted.
    leave: ends the process from the thread, with an error.
    stopped: whether `due` has returned True.
  """

  def __init__(
    self, notices: Notices | None = None, *, patience: float = _PATIENCE_SECONDS
  ) -> None:
    """Starts outside of the loop; `notices` may be set later."""
    self.notices = notices
    self.busy: Callable[[], bool] = lambda: False
    self.leave: Callable[[KeyboardInterrupt], Any] = lambda error: os._exit(
      128 + signal.SIGINT
    )
    self.stopped = False
    self._patience = patience
    # Reentrant: the handler may interrupt the main thread anywhere.
    self._lock = threading.RLock()
    self._signal_number: int | None = None
    self._looping = False
    self._handled = self._received = 0
    self._raised = False
    self._previous: dict[int, Any] = {}
    self._ended = threading.Event()

  @property
  def signal_number(self) -> int | None:
    """The signal that this or another host received, None before."""
    if self.notices is not None and self.notices.stop_signal is not None:
      return self.notices.stop_signal
    return self._signal_number

  def begin(self) -> None:
    """Enters the training loop, in which a stop saves first.

    Raises:
      KeyboardInterrupt: a signal arrived before.
    """
    with self._lock:
      self._raise_late()
      self._looping = True
    if self.notices is not None:
      self.notices.agreement.begin()

  def finish(self) -> None:
    """Leaves the training loop after its last save.

    Raises:
      KeyboardInterrupt: a signal arrived after the last step.
    """
    with self._lock:
      self._looping = False
      self._raise_late()

  def due(self) -> bool:
    """Returns whether the run ends here, equal on all hosts.

    Call it after every step and before every batch of an evaluation in the
    loop, in the same order on all hosts.
    """
    if self.notices is not None:
      due = self.notices.agreement.due()
    else:
      due = self._signal_number is not None
    self.stopped |= due
    return due

  def __enter__(self) -> Self:
    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
      return self
    self._reader, self._writer = socket.socketpair()
    self._reader.setblocking(False)
    self._writer.setblocking(False)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    self._previous_fd = signal.set_wakeup_fd(
      self._writer.fileno(), warn_on_full_buffer=False
    )
    for number in _SIGNALS:
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self, ignore: bool = False) -> None:
    """Restores the previous handlers, or ignores signals from now on."""
    if not self._previous:
      return
    for number, handler in self._previous.items():
      signal.signal(number, signal.SIG_IGN if ignore else handler)
    signal.set_wakeup_fd(self._previous_fd)
    self._ended.set()
    with contextlib.suppress(OSError):
      self._writer.send(b"\0")
    self._thread.join()
    self._reader.close()
    self._writer.close()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    """Runs in the main thread as soon as it executes Python code."""
    del frame
    self._handled += 1
    # Only once: a second error would interrupt the clean-up of the first. If
    # that takes too long, the thread ends the process.
    if self._note(number) and not self._raised:
      self._raised = True
      raise _error(number, self._looping)

  def _note(self, number: int) -> bool:
    """Records a signal; returns whether it requires an end at once."""
    with self._lock:
      first = self._signal_number is None
      if first:
        self._signal_number = number
      # Both threads receive each signal, in either order.
      insists = not self._looping or max(self._handled, self._received) > 1
      if insists or not first:
        return insists
      if self.notices is not None and self.notices.stop_signal is None:
        self.notices.stop_signal = number
    name = signal.Signals(number).name
    text = f"{name}: stopping after this step; once more to stop at once\n"
    # Not `print`: the signal may have interrupted another one. A missing
    # terminal does not matter.
    with contextlib.suppress(OSError):
      os.write(2, text.encode())
    return False

  def _raise_late(self) -> None:
    if self._signal_number is not None:
      raise _error(self._signal_number, unsaved=False)

  def _watch(self) -> None:
    """Reads signals and ends the process if the main thread does not."""
    number = 0
    deadline = None
    while not self._ended.is_set():
      timeout = None if deadline is None else 0.1
      if select.select([self._reader], [], [], timeout)[0]:
        for number in self._reader.recv(64):
          if number not in _SIGNALS:
            continue
          self._received += 1
          if self._note(number) and deadline is None:
            deadline = time.monotonic() + self._patience
      if deadline is None or time.monotonic() < deadline:
        continue
      insists = max(self._handled, self._received) > 1
      if not self._ended.is_set() and (insists or not self.busy()):
        self.leave(_error(number, self._looping))
        return


def ignore_signals() -> None:
  """Ignores Ctrl-C and SIGTERM in a process that is ending."""
  if threading.current_thread() is threading.main_thread():
    for number in _SIGNALS:
      signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
  """Raises `Terminated` on SIGTERM, which by default ends silently."""

  def handle(number: int, frame: FrameType | None) -> None:
    raise Terminated

  previous = signal.signal(signal.SIGTERM, handle)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)
