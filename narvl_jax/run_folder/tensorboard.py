"""Scalars for TensorBoard, written by the thread that has them."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from narvl_jax.files import side_files


class Board:
  """An event file in a folder.

  tensorboardX's own `SummaryWriter` writes in a thread: on a full disk that
  dies with a traceback, and who adds more then waits for ever. Here the error
  meets the caller.
  """

  def __init__(self, folder: pathlib.Path, first_step: int) -> None:
    """Opens a file.

    Args:
      folder: made if need be, in one that exists.
      first_step: TensorBoard hides what earlier files have from there on.

    Raises:
      OSError: it cannot be written.
    """
    # It pulls in protobuf: only runs that write pay for it.
    with _torch_hidden():
      from tensorboardX import summary
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto import event_pb2

    # Its classes are made at run time.
    messages: Any = event_pb2
    side_files.make_way(folder, folder=True)
    folder.mkdir(exist_ok=True)
    self._event = messages.Event
    self._scalar = summary.scalar
    self._writer = EventsWriter(str(folder / "events"))
    start = messages.SessionLog(status=messages.SessionLog.START)
    self._writer.write_event(messages.Event(step=first_step, session_log=start))

  def add_scalar(self, name: str, value: float, step: int) -> None:
    """Adds a point."""
    self._writer.write_event(
      self._event(
        wall_time=time.time(), step=step, summary=self._scalar(name, value)
      )
    )

  def flush(self) -> None:
    """Puts what was added on disk."""
    self._writer.flush()

  def close(self) -> None:
    """Flushes and closes the file."""
    self._writer.close()


@contextlib.contextmanager
def _torch_hidden() -> Iterator[None]:
  """Keeps tensorboardX from importing torch for a type that it may be given.

  Where torch is installed, that takes seconds and 0.2 GB of every run.
  """
  if "torch" in sys.modules or "tensorboardX" in sys.modules:
    yield
    return
  # What Python takes for a module that cannot be imported.
  sys.modules["torch"] = None  # pyright: ignore
  try:
    yield
  finally:
    sys.modules.pop("torch", None)
