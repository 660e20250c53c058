"""Metrics of a run in `metrics.jsonl` and TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, Self

from narvl_jax.files import side_files
from narvl_jax.files.disk import atomically
from narvl_jax.files.spool import Spool
from narvl_jax.files.stores import as_path
from narvl_jax.run_folder import METRICS_FILE
from narvl_jax.run_folder.tensorboard import Board


class MetricsWriter:
  """Writes one JSON object per step to `metrics.jsonl`, and to TensorBoard.

  All values of a step end up in one line.
  """

  def __init__(
    self, workdir: str | os.PathLike[str], resumed_step: int = 0
  ) -> None:
    """Opens the files of a run; damaged lines are set aside.

    Args:
      workdir: the run folder; must exist.
      resumed_step: lines after this step are removed; they will be written
        again.

    Raises:
      OSError: a file cannot be written.
    """
    names = (METRICS_FILE, METRICS_FILE + side_files.DAMAGED)
    self._spool = Spool(as_path(workdir), names)
    self._workdir = self._spool.folder
    self._open(resumed_step)

  def _open(self, resumed_step: int) -> None:
    self._path = self._workdir / METRICS_FILE
    written = side_files.repair_lines(self._path, _is_line)
    lines = [line for line in written if line["step"] <= resumed_step]
    if len(lines) < len(written):
      with atomically(self._path) as temporary:
        temporary.write_bytes(b"".join(map(_encode, lines)))
    self._step = resumed_step
    self._values: dict[str, float | None] = {}
    # Whether the line of the current step is in the file.
    self._is_written = bool(lines) and lines[-1]["step"] == resumed_step
    if self._is_written:
      self._values = {k: v for k, v in lines[-1].items() if k != "step"}
    self._changed = False
    self._open_end()
    self._board = Board(self._workdir / "tensorboard", resumed_step + 1)

  def _open_end(self) -> None:
    self._file = self._path.open("ab")
    # Start of the next line.
    self._offset = self._file.seek(0, os.SEEK_END)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds values to the line of `step`; non-finite ones become null."""
    if step != self._step:
      self.flush()
      self._step, self._values, self._is_written = step, {}, False
    for name, value in values.items():
      finite = math.isfinite(value)
      self._values[name] = float(value) if finite else None
      if finite:
        self._board.add_scalar(name, float(value), step)
    self._changed = True

  def go_back(self, step: int) -> None:
    """Removes the lines after a step; they will be written again."""
    self._close_files()
    self._open(step)

  def flush(self) -> None:
    """Writes the line of the current step.

    Raises:
      OSError: for example, the disk is full.
    """
    if not self._changed:
      return
    line = _encode({"step": self._step, **self._values})
    if self._is_written:
      self._replace_last(line)
    else:
      self._append(line)
    self._board.flush()
    self._changed = False

  def _append(self, line: bytes) -> None:
    try:
      # Removes a part that was written before the disk was full.
      self._file.truncate(self._offset)
      self._file.write(line)
      self._file.flush()
    except OSError as error:
      # Errors of an open file lack its name.
      name = self._file.name
      raise OSError(error.errno, error.strerror, name) from error
    self._offset += len(line)
    self._is_written = True

  def _replace_last(self, line: bytes) -> None:
    """Replaces the file, so that the old line is never missing."""
    self._file.close()
    try:
      # It may have been removed.
      written = self._path.read_bytes() if self._path.exists() else b""
      before = written[: self._offset].splitlines(keepends=True)[:-1]
      with atomically(self._path) as temporary:
        temporary.write_bytes(b"".join([*before, line]))
    finally:
      self._open_end()

  def sync(self) -> None:
    """Flushes, and waits until the files of a run in a store are there.

    Raises:
      OSError: for example, the disk is full.
    """
    self.flush()
    self._spool.sync()

  def close(self) -> None:
    """Flushes and closes the files."""
    self._close_files()
    self._spool.close()

  def _close_files(self) -> None:
    self.flush()
    self._file.close()
    self._board.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class SilentMetrics:
  """A `MetricsWriter` that writes nothing, for hosts other than the first."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Does nothing."""

  def go_back(self, step: int) -> None:
    """Does nothing."""

  def flush(self) -> None:
    """Does nothing."""

  def sync(self) -> None:
    """Does nothing."""


def _is_line(line: Mapping[str, Any]) -> bool:
  return type(line.get("step")) is int


def _encode(line: Mapping[str, Any]) -> bytes:
  return json.dumps(line).encode() + b"\n"


def format_bytes(count: float) -> str:
  """Returns a size such as `1.5 MB`."""
  units = ("B", "kB", "MB", "GB", "TB")
  power = 0
  while count >= 1000 and power < len(units) - 1:
    count /= 1000
    power += 1
  return f"{count:.1f} {units[power]}"
