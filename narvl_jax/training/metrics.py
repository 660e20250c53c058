"""Metrics of a run: `metrics.jsonl`, TensorBoard and the progress line."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import numpy as np


class MetricsWriter:
  """Writes one JSON object a step to `metrics.jsonl`, and to TensorBoard.

  What is written for a step is one line, complete when the next step is
  written or at `flush`.
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
    # TensorBoard pulls in protobuf: only runs that write pay for it.
    import tensorboardX

    workdir = pathlib.Path(workdir)
    path = workdir / "metrics.jsonl"
    truncate(path, resumed_step)
    self._file = path.open("a", encoding="utf-8")
    self._board = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=resumed_step + 1
    )
    self._pending: dict[str, float] = {}
    self._step = resumed_step

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds values to the line of `step`; those not finite become null."""
    if step != self._step:
      self.flush()
      self._step = step
    for name, value in values.items():
      self._pending[name] = float(value)
      if math.isfinite(value):
        self._board.add_scalar(name, float(value), step)

  def flush(self) -> None:
    """Completes the line of the current step."""
    if self._pending:
      line = {
        name: value if math.isfinite(value) else None
        for name, value in self._pending.items()
      }
      self._file.write(json.dumps({"step": self._step, **line}) + "\n")
      self._pending = {}
    self._file.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    self.flush()
    self._file.close()
    self._board.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def truncate(path: pathlib.Path, last_step: int) -> None:
  """Removes lines after `last_step`, and a last line that was cut short."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      if json.loads(line)["step"] <= last_step:
        kept.append(line + "\n")
    except (json.JSONDecodeError, KeyError):
      continue
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_text("".join(kept), encoding="utf-8")
  os.replace(temporary, path)


def mean_metrics(
  steps: Iterable[Mapping[str, jax.Array]],
) -> dict[str, float]:
  """Fetches the metrics of several steps and averages each over the steps.

  Steps in which a metric is nan, a task that the batch lacked, do not count
  for it; `learning_rate` is that of the last step, and the loss is nan as
  soon as one step's is.
  """
  fetched: list[dict[str, Any]] = jax.device_get(list(steps))
  means = {}
  for name in fetched[0]:
    values = np.array([step[name] for step in fetched], np.float64)
    if name.startswith("nll/"):
      values = values[~np.isnan(values)]
      if not len(values):
        continue
    means[name] = float(values.mean())
  means["learning_rate"] = float(fetched[-1]["learning_rate"])
  del means["examples"]
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
