"""Metrics of a run in `metrics.jsonl` and its trackers."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Self

from narvl_jax.files import side_files
from narvl_jax.files.disk import atomically
from narvl_jax.files.spool import Spool
from narvl_jax.files.stores import as_path
from narvl_jax.run_folder import METRICS_FILE
from narvl_jax.run_folder.trackers import open_trackers


class MetricsWriter:
  """Writes one JSON object per step to `metrics.jsonl`, and to the trackers.

  All values of a step end up in one line, with the Unix time of the first.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    resumed_step: int = 0,
    config: Mapping[str, Any] | None = None,
  ) -> None:
    """Opens the files of a run; damaged lines are set aside.

    Args:
      workdir: the run folder; must exist.
      resumed_step: lines after this step are removed; they will be written
        again.
      config: names the trackers; None: TensorBoard.

    Raises:
      OSError: a file cannot be written.
    """
    names = (METRICS_FILE, METRICS_FILE + side_files.DAMAGED)
    self._spool = Spool(as_path(workdir), names)
    self._workdir = self._spool.folder
    self._open(resumed_step)
    self._trackers = open_trackers(
      as_path(workdir), self._workdir, resumed_step, config
    )

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

  def _open_end(self) -> None:
    self._file = self._path.open("ab")
    # Start of the next line.
    self._offset = self._file.seek(0, os.SEEK_END)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds values to the line of `step`; non-finite ones become null."""
    if step != self._step:
      self.flush()
      self._step, self._values, self._is_written = step, {}, False
    self._values.setdefault("time", round(time.time(), 3))
    finite = {k: float(v) for k, v in values.items() if math.isfinite(v)}
    self._values |= {name: finite.get(name) for name in values}
    for tracker in self._trackers:
      tracker.write(step, finite)
    self._changed = True

  def go_back(self, step: int) -> None:
    """Removes the lines after a step; they will be written again."""
    self.flush()
    self._file.close()
    self._open(step)
    for tracker in self._trackers:
      tracker.go_back(step)

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
    for tracker in self._trackers:
      tracker.flush()
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

  def write_image(self, step: int, name: str, path: pathlib.Path) -> None:
    """Adds a picture of a step to the trackers that show pictures."""
    for tracker in self._trackers:
      tracker.write_image(step, name, path)

  def sync(self) -> None:
    """Flushes, and waits until the files of a run in a store are there.

    Raises:
      OSError: for example, the disk is full.
    """
    self.flush()
    self._spool.sync()

  def close(self, failed: bool = False) -> None:
    """Flushes and closes the files; `failed`: the run has not finished."""
    self.flush()
    self._file.close()
    for tracker in self._trackers:
      tracker.close(failed)
    self._spool.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: object, *_: object) -> None:
    self.close(failed=kind is not None)


class SilentMetrics:
  """A `MetricsWriter` that writes nothing, for hosts other than the first."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Does nothing."""

  def go_back(self, step: int) -> None:
    """Does nothing."""

  def write_image(self, step: int, name: str, path: pathlib.Path) -> None:
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
