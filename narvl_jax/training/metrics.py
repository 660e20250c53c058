"""Metrics of a run: `metrics.jsonl`, TensorBoard and the progress line."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import numpy as np

from narvl_jax.disk import write_text
from narvl_jax.training.board import Board

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
  """Writes one JSON object a step to `metrics.jsonl`, and to TensorBoard.

  Whatever is written for a step, and whenever, ends up in its one line.
  """

  def __init__(
    self, workdir: str | os.PathLike[str], resumed_step: int = 0
  ) -> None:
    """Opens the files of a run.

    Args:
      workdir: the run folder; must exist.
      resumed_step: the run goes on after this step; later lines, which will
        be written again, are removed.
    """
    self._workdir = pathlib.Path(workdir)
    self._open(resumed_step)

  def _open(self, resumed_step: int) -> None:
    path = self._workdir / METRICS_FILE
    lines = _lines_until(path, resumed_step)
    self._step = resumed_step
    self._values: dict[str, float | None] = {}
    if lines and lines[-1]["step"] == resumed_step:
      self._values = {k: v for k, v in lines.pop().items() if k != "step"}
    self._changed = bool(self._values)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    self._file = path.open("r+", encoding="utf-8")
    # Where the line of the current step starts.
    self._offset = self._file.seek(0, os.SEEK_END)
    self._board = Board(self._workdir / "tensorboard", resumed_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds values to the line of `step`; those not finite become null."""
    if step != self._step:
      self.flush()
      self._offset = self._file.seek(0, os.SEEK_END)
      self._step, self._values = step, {}
    for name, value in values.items():
      finite = math.isfinite(value)
      self._values[name] = float(value) if finite else None
      if finite:
        self._board.add_scalar(name, float(value), step)
    self._changed = True

  def go_back(self, step: int) -> None:
    """Removes the lines after a step, which will be written again."""
    self.close()
    self._open(step)

  def flush(self) -> None:
    """Puts the line of the current step on disk.

    Raises:
      OSError: it has no room, for example.
    """
    if not self._changed:
      return
    line = {"step": self._step, **self._values}
    try:
      self._file.seek(self._offset)
      self._file.write(json.dumps(line) + "\n")
      self._file.truncate()
      self._file.flush()
    except OSError as error:
      # An open file does not say which one it is.
      name = self._file.name
      raise OSError(error.errno, error.strerror, name) from error
    self._board.flush()
    self._changed = False

  def close(self) -> None:
    """Flushes and closes the files."""
    self.flush()
    self._file.close()
    self._board.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class SilentMetrics:
  """In the place of a `MetricsWriter` on hosts that write nothing."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Does nothing."""

  def go_back(self, step: int) -> None:
    """Does nothing."""

  def flush(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    pass


def _lines_until(path: pathlib.Path, last_step: int) -> list[dict[str, Any]]:
  """Returns the lines up to a step; one that was cut short is left out."""
  lines = []
  if path.exists():
    for text in path.read_text(encoding="utf-8").splitlines():
      try:
        line = json.loads(text)
      except json.JSONDecodeError:
        continue
      if line["step"] <= last_step:
        lines.append(line)
  return lines


def mean_metrics(
  steps: Iterable[Mapping[str, jax.Array]],
) -> dict[str, float]:
  """Fetches the metrics of several steps and averages each over the steps.

  Steps in which a metric is nan, a task that the batch lacked, do not count
  for it, nor do steps whose update was left out, unless all were;
  `learning_rate` is that of the last step.
  """
  fetched: list[dict[str, Any]] = jax.device_get(list(steps))
  kept = [step for step in fetched if not step["skipped"]] or fetched
  means = {}
  for name in fetched[0]:
    values = np.array([step[name] for step in kept], np.float64)
    if name.startswith("nll/"):
      values = values[~np.isnan(values)]
      if not len(values):
        continue
    means[name] = float(values.mean())
  means["learning_rate"] = float(fetched[-1]["learning_rate"])
  del means["examples"], means["skipped"]
  return means


def format_duration(seconds: float) -> str:
  """Returns a duration such as `2h05m`, `3m20s` or `7s`."""
  seconds = round(seconds)
  if seconds >= 3600:
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
  if seconds >= 60:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  return f"{seconds}s"


def format_bytes(count: float) -> str:
  """Returns a size such as `1.5 MB`."""
  units = ("B", "kB", "MB", "GB", "TB")
  power = 0
  while count >= 1000 and power < len(units) - 1:
    count /= 1000
    power += 1
  return f"{count:.1f} {units[power]}"
