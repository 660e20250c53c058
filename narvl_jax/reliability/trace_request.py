"""Requests for a trace of a run that is alive."""

import contextlib
import pathlib
import signal
import threading
from typing import Any, Self

from narvl_jax.hosts.agreement import TraceAgreement

REQUEST_FILE = "TRACE"
# Stands for `config.profile.steps`.
DEFAULT = 0
_MOST_UPDATES = 1000


class TraceRequest:
  """SIGUSR1, or the file `TRACE` in the run folder.

  The file may contain a number of updates. It is removed when it is read.

  Attributes:
    agreement: that of `Notices` in a run of several hosts.
  """

  def __init__(self, workdir: pathlib.Path) -> None:
    self.agreement = TraceAgreement()
    self._file = workdir / REQUEST_FILE
    self._previous: Any = None

  def due(self) -> int | None:
    """See `TraceAgreement.due`; `DEFAULT` if no number was given."""
    return self.agreement.due()

  def look(self) -> None:
    """Looks for the file; one host calls it every few seconds."""
    with contextlib.suppress(OSError):
      if not self._file.exists():
        return
      text = self._file.read_text(errors="replace").strip()
      self._file.unlink()
      updates = int(text) if text.isdecimal() else DEFAULT
      self.agreement.request(min(updates, _MOST_UPDATES))

  def __enter__(self) -> Self:
    # Only the main thread may set handlers.
    if threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(
        signal.SIGUSR1, lambda *_: self.agreement.request(DEFAULT)
      )
    return self

  def __exit__(self, *_: object) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGUSR1, self._previous)
