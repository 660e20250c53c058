"""Updates whose loss or gradient is not finite, and loss spikes.

The compiled update skips itself in that case (see `train_step`).
`config.bad_numbers.policy` decides what follows:

stop      the run ends; no state of that step or a later one is saved.
skip      the run continues with the next batch.
rollback  the run returns to its last checkpoint and continues with the batch
          after the bad one.

Every host sees the same numbers in the same order, so all make the same
decision at the same step without communication.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import Config
from narvl_jax.files.disk import atomically, write_json
from narvl_jax.files.regular import read_regular
from narvl_jax.files.stores import as_path
from narvl_jax.hosts import distributed
from narvl_jax.parallel import local_rows
from narvl_jax.parallel.batches import local_values
from narvl_jax.terminal.text import warn

FOLDER = "bad_numbers"
# Largest and least number of losses that a spike is compared with.
_WINDOW = 100
_FEWEST = 10
_INFO_FILE = "update.json"
_COUNTS = ("skipped_updates", "rollbacks", "loss_spikes")
# Seconds in which the other hosts write their files.
_PATIENCE_SECONDS = 15.0


@dataclasses.dataclass
class Health:
  """Counts of bad updates and recent losses, stored with checkpoints.

  Attributes:
    spike_factor: a loss above this multiple of the median of the last 100 is
      a spike; 0 counts none.
    skipped_updates: number of skipped updates.
    rollbacks: number of returns to a checkpoint.
  """

  spike_factor: float
  skipped_updates: int = 0
  rollbacks: int = 0
  loss_spikes: int = 0
  losses: collections.deque[float] = dataclasses.field(
    default_factory=lambda: collections.deque(maxlen=_WINDOW)
  )

  def restore(self, stored: Mapping[str, Any]) -> None:
    """Restores the result of `to_json`; an empty mapping resets all."""
    for name in _COUNTS:
      setattr(self, name, int(stored.get(name, 0)))
    self.losses.clear()
    self.losses.extend(stored.get("losses", ()))

  def to_json(self) -> dict[str, Any]:
    """Returns counts and losses for a checkpoint."""
    return {**self.counts(), "losses": list(self.losses)}

  def counts(self) -> dict[str, int]:
    """Returns the counts by name."""
    return {name: getattr(self, name) for name in _COUNTS}

  def add(self, loss: float) -> None:
    """Records the finite loss of the next step."""
    if self.spike_factor and len(self.losses) >= _FEWEST:
      usual = statistics.median(self.losses)
      self.loss_spikes += loss > self.spike_factor * usual > 0
    self.losses.append(loss)

  def forget_losses(self) -> None:
    """Forgets the losses that later ones are compared with."""
    self.losses.clear()

  def __str__(self) -> str:
    return (
      f"{self.loss_spikes} loss spikes, {self.skipped_updates} updates skipped,"
      f" {self.rollbacks} rollbacks"
    )


def what_is_bad(metrics: Mapping[str, float]) -> str:
  """Returns for example `loss is nan` for the metrics of a bad update."""
  for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
    if not math.isfinite(metrics[name]):
      return f"{words} is {metrics[name]}"
  raise AssertionError(f"nothing is bad: {metrics}")


def give_up(
  bad: str, policy: str, limit: int, bundle: pathlib.Path
) -> UserError:
  """Returns the error that ends a run."""
  lower = (
    "lower --config.optimizer.learning_rate or lengthen"
    " --config.optimizer.warmup_steps, in another --workdir"
  )
  if policy == "stop":
    return UserError(
      f"{bad}; {lower}, or resume this one without the batch:"
      f" --config.bad_numbers.policy=skip, or rollback; the"
      " batch and its metrics are in"
      f" {bundle}"
    )
  what = "updates were skipped" if policy == "skip" else "rollbacks were made"
  return UserError(
    f"{bad}, and {limit} {what} already; {lower}, or resume this one:"
    f" --config.bad_numbers.limit={2 * max(limit, 1)}; the"
    " batch and its metrics are in"
    f" {bundle}"
  )


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A bad update, complete enough to repeat it.

  Attributes:
    info: "step", "data_position", "policy", "checkpoint" (step of the last
      one, or None), "metrics", "dropout_key" ("data" is the key of "seed"
      after folding in "folded_in"), and "examples", the [entry, number of the
      record] of every row.
    batch: arrays [B, ...] of the update.
  """

  info: dict[str, Any]
  batch: dict[str, np.ndarray]


class BundleWriter:
  """Writes `WORKDIR/bad_numbers/step_NNNNNNN` for every bad update."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    config: Config,
    mesh: Mesh,
    examples: Callable[[int], Sequence[tuple[str, int]]],
  ) -> None:
    self._folder = as_path(workdir) / FOLDER
    self._config = config
    self._mesh = mesh
    self._examples = examples

  def write(
    self,
    step: int,
    position: int,
    batch: Mapping[str, jax.Array],
    metrics: Mapping[str, float],
    checkpoint: int | None,
  ) -> pathlib.Path:
    """Writes the rows of this host and, on the first host, `update.json`.

    Waits for all hosts, since the first one to end ends all. A failed write is
    only a warning, so that it does not hide the bad update.

    Args:
      step: number of the update, from 1.
      position: position of its batch in the data.
      batch: arrays [B, ...] on the devices.
      metrics: metrics of the update; may be NaN.

    Returns:
      The folder.
    """
    # After a rollback the same step may fail again, on another batch.
    ahead = position + 1 - step
    name = f"step_{step:07d}" + (f"_ahead_{ahead:07d}" if ahead else "")
    folder = self._folder / name
    info = {
      "step": step,
      "data_position": position,
      "policy": self._config.bad_numbers.policy,
      "checkpoint": checkpoint,
      "metrics": {name: _json_number(x) for name, x in metrics.items()},
      "dropout_key": _dropout_key(self._config.seed, step),
      "examples": self._examples(position),
    }
    rows = local_rows(self._mesh, self._config.train.batch_size)
    own = {name: local_values(array, rows) for name, array in batch.items()}
    try:
      _write(folder, info, own, rows)
    except (OSError, UserError) as error:
      warn(f"{folder} cannot be written: {error}")
    with contextlib.suppress(distributed.HostsLost):
      distributed.barrier(f"{name} written", timeout=_PATIENCE_SECONDS)
    return folder


def _write(
  folder: pathlib.Path,
  info: Mapping[str, Any],
  arrays: Mapping[str, np.ndarray],
  rows: Sequence[int],
) -> None:
  # A run folder that has vanished is not created again.
  folder.parent.mkdir(exist_ok=True)
  folder.mkdir(exist_ok=True)
  host = jax.process_index()
  path = folder / f"host_{host:03d}.npz"
  with atomically(path) as temporary, temporary.open("wb") as file:
    np.savez(file, **{**arrays, "rows": np.asarray(rows)})  # pyright: ignore
  if distributed.is_first():
    write_json(folder / _INFO_FILE, info, inside=folder)


def _dropout_key(seed: int, step: int) -> dict[str, Any]:
  key = jax.random.fold_in(jax.random.key(seed), step - 1)
  data = np.asarray(jax.random.key_data(key)).tolist()
  return {"seed": seed, "folded_in": step - 1, "data": data}


def load_bundle(folder: str | os.PathLike[str]) -> Bundle:
  """Reads a bad update from `WORKDIR/bad_numbers/step_NNNNNNN`.

  Raises:
    UserError: it cannot be read, or the rows of a host are missing.
  """
  folder = as_path(folder)
  try:
    info = json.loads(read_regular(folder / _INFO_FILE).decode("utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    known = sorted(map(str, folder.parent.glob("step_*")))
    raise UserError(
      f"{folder} is not an update that a run has skipped ({error})."
      f"{did_you_mean(str(folder), known)}"
    ) from error
  info["metrics"] = {k: float(v) for k, v in info["metrics"].items()}
  size = len(info["examples"])
  batch: dict[str, np.ndarray] = {}
  missing = set(range(size))
  for path in sorted(folder.glob("host_*.npz")):
    with path.open("rb") as file, np.load(file) as arrays:
      rows = arrays["rows"]
      for name in set(arrays.files) - {"rows"}:
        values = arrays[name]
        empty = np.zeros((size, *values.shape[1:]), values.dtype)
        batch.setdefault(name, empty)[rows] = values
    missing -= set(rows.tolist())
  if missing:
    raise UserError(
      f"{folder} lacks the rows {sorted(missing)}: the file host_NNN.npz of a"
      " host is missing"
    )
  return Bundle(info, batch)


def _json_number(value: float) -> float | str:
  """Returns a value that JSON can store and `float` can read."""
  return value if math.isfinite(value) else str(value)
