"""Scalars for TensorBoard, written in the calling thread."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from narvl_jax.files import side_files


class Board:
  """An event file in a folder.

  tensorboardX's `SummaryWriter` writes in a thread, which dies on a full disk
  and then blocks its callers. Here the caller gets the error.
  """

  def __init__(self, folder: pathlib.Path, first_step: int) -> None:
    """Opens a file.

    Args:
      folder: created if its parent exists.
      first_step: TensorBoard hides points of earlier files from here on.

    Raises:
      OSError: it cannot be written.
    """
    # Imports protobuf, which only writing processes need.
    with _torch_hidden():
      from tensorboardX import summary
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto import event_pb2

    # Its classes are created at run time.
    messages: Any = event_pb2
    side_files.make_way(folder, folder=True)
    folder.mkdir(exist_ok=True)
    self._event = messages.Event
    self._start = messages.SessionLog(status=messages.SessionLog.START)
    self._scalar = summary.scalar
    self._new_file = lambda: EventsWriter(str(folder / "events"))
    self._open(first_step)

  def _open(self, first_step: int) -> None:
    self._writer = self._new_file()
    self._writer.write_event(
      self._event(step=first_step, session_log=self._start)
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds points."""
    for name, value in values.items():
      summary = self._scalar(name, value)
      event = self._event(wall_time=time.time(), step=step, summary=summary)
      self._writer.write_event(event)

  def write_image(self, step: int, name: str, path: pathlib.Path) -> None:
    """Does nothing: the pictures are in the run folder."""

  def go_back(self, step: int) -> None:
    """Begins a file that hides the points after `step`."""
    self._writer.close()
    self._open(step + 1)

  def flush(self) -> None:
    """Writes buffered points to disk."""
    self._writer.flush()

  def close(self, failed: bool = False) -> None:
    """Flushes and closes the file."""
    self._writer.close()


@contextlib.contextmanager
def _torch_hidden() -> Iterator[None]:
  """Prevents tensorboardX from importing torch, which takes seconds."""
  if "torch" in sys.modules or "tensorboardX" in sys.modules:
    yield
    return
  # None marks a module that cannot be imported.
  sys.modules["torch"] = None  # pyright: ignore
  try:
    yield
  finally:
    sys.modules.pop("torch", None)
