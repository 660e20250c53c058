"""Updates whose numbers are no longer finite, and losses that jump.

The devices leave out such an update themselves (see `train_step`); here a run
decides what comes next, by `config.bad_numbers.policy`:

stop      the run ends; no state of that step or a later one is ever saved.
skip      the run goes on with the next batch.
rollback  the run goes back to its last checkpoint, and on with the batch after
          the bad one.

Every host sees the same numbers in the same order, so all come to the same
decision in the same step without asking each other.
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
from narvl_jax.files.disk import atomically
from narvl_jax.files.regular import read_regular
from narvl_jax.hosts import distributed
from narvl_jax.parallel import local_rows
from narvl_jax.parallel.batches import local_values
from narvl_jax.terminal.text import warn

FOLDER = "bad_numbers"
# Losses of which a spike stands out, and how many there must be at least.
_WINDOW = 100
_FEWEST = 10
_INFO_FILE = "update.json"
# For the other hosts to write their part.
_PATIENCE_SECONDS = 15.0


@dataclasses.dataclass
class Health:
  """What a run remembers of its losses, also across restarts.

  Attributes:
    spike_factor: a loss of so many times the median of the last 100 is a
      spike; 0 counts none.
    skipped_updates: updates left out.
    rollbacks: times that the run went back to a checkpoint.
    loss_spikes: spikes so far.
    losses: the last finite ones.
  """

  spike_factor: float
  skipped_updates: int = 0
  rollbacks: int = 0
  loss_spikes: int = 0
  losses: collections.deque[float] = dataclasses.field(
    default_factory=lambda: collections.deque(maxlen=_WINDOW)
  )

  def restore(self, stored: Mapping[str, Any]) -> None:
    """Takes over what `to_json` returned; nothing for an empty mapping."""
    for name in ("skipped_updates", "rollbacks", "loss_spikes"):
      setattr(self, name, int(stored.get(name, 0)))
    self.losses.clear()
    self.losses.extend(stored.get("losses", ()))

  def to_json(self) -> dict[str, Any]:
    """Returns all counts and losses, as a checkpoint stores them."""
    return {**self.counts(), "losses": list(self.losses)}

  def counts(self) -> dict[str, int]:
    """Returns the counts by name."""
    return {
      "skipped_updates": self.skipped_updates,
      "rollbacks": self.rollbacks,
      "loss_spikes": self.loss_spikes,
    }

  def add(self, loss: float) -> None:
    """Takes note of the finite loss of the next step."""
    if self.spike_factor and len(self.losses) >= _FEWEST:
      usual = statistics.median(self.losses)
      self.loss_spikes += loss > self.spike_factor * usual > 0
    self.losses.append(loss)

  def forget_losses(self) -> None:
    """Begins anew with what later losses are compared with."""
    self.losses.clear()

  def __str__(self) -> str:
    return (
      f"{self.loss_spikes} loss spikes, {self.skipped_updates} updates skipped,"
      f" {self.rollbacks} rollbacks"
    )


def what_is_bad(metrics: Mapping[str, float]) -> str:
  """Returns words such as `loss is nan` for the metrics of a bad update."""
  for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
    if not math.isfinite(metrics[name]):
      return f"{words} is {metrics[name]}"
  raise AssertionError(f"nothing is bad: {metrics}")


def give_up(
  bad: str, policy: str, limit: int, bundle: pathlib.Path
) -> UserError:
  """Returns the error that ends a run.

  Args:
    bad: such as `the loss is nan at step 7`.
    policy: see above.
    limit: of skipped updates or rollbacks, which this one would exceed.
    bundle: folder of the update.
  """
  lower = (
    "lower --config.optimizer.learning_rate or lengthen"
    " --config.optimizer.warmup_steps, in another --workdir"
  )
  if policy == "stop":
    return UserError(
      f"{bad}; {lower}, or go on in this one without the batch:"
      f" --config.bad_numbers.policy=skip, or rollback; what led to it is in"
      f" {bundle}"
    )
  what = "updates were skipped" if policy == "skip" else "rollbacks were made"
  return UserError(
    f"{bad}, and {limit} {what} already; {lower}, or go on in this one:"
    f" --config.bad_numbers.limit={2 * max(limit, 1)}; what led to it is in"
    f" {bundle}"
  )


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A bad update, to be looked at and repeated.

  Attributes:
    info: "step", "data_position", "policy", "checkpoint" (step of the last
      one, or None), "metrics", "dropout_key" ("data" is that of the
      key of "seed" into which "folded_in" was folded), and "examples", the
      [entry, number of the record] of every row.
    batch: arrays [B, ...] that the update was given.
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
    """Takes what there is to know of an update.

    Args:
      workdir: the run folder.
      config: of the run.
      mesh: where its batches lie.
      examples: position -> `TrainBatches.examples`.
    """
    self._folder = pathlib.Path(workdir) / FOLDER
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
    """Writes the rows of this host, and on the first host all else.

    Returns once all hosts have, since one that ends ends all. Whatever cannot
    be written is only warned of: it must not hide why it was to be written.

    Args:
      step: of the update; the first is 1.
      position: of its batch in the data.
      batch: arrays [B, ...] on the devices.
      metrics: of the update; may be nan.
      checkpoint: step of the last one.

    Returns:
      The folder.
    """
    # After a rollback a step may be bad a second time, on another batch.
    ahead = position + 1 - step
    name = f"step_{step:07d}" + (f"_ahead_{ahead:07d}" if ahead else "")
    folder = self._folder / name
    info = {
      "step": step,
      "data_position": position,
      "policy": self._config.bad_numbers.policy,
      "checkpoint": checkpoint,
      "metrics": {name: _spelled(x) for name, x in metrics.items()},
      "dropout_key": _dropout_key(self._config.seed, step),
      "examples": self._examples(position),
    }
    rows = local_rows(self._mesh, self._config.train.batch_size)
    own = {name: local_values(array, rows) for name, array in batch.items()}
    try:
      _write(folder, info, own, rows)
    except OSError as error:
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
  # A run folder that is gone is not made again.
  folder.parent.mkdir(exist_ok=True)
  folder.mkdir(exist_ok=True)
  host = jax.process_index()
  path = folder / f"host_{host:03d}.npz"
  with atomically(path) as temporary, temporary.open("wb") as file:
    np.savez(file, **{**arrays, "rows": np.asarray(rows)})  # pyright: ignore
  if distributed.is_first():
    with atomically(folder / _INFO_FILE) as temporary:
      temporary.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def _dropout_key(seed: int, step: int) -> dict[str, Any]:
  """Returns what the dropout of an update is drawn from."""
  key = jax.random.fold_in(jax.random.key(seed), step - 1)
  data = np.asarray(jax.random.key_data(key)).tolist()
  return {"seed": seed, "folded_in": step - 1, "data": data}


def load_bundle(folder: str | os.PathLike[str]) -> Bundle:
  """Reads what a run has written of a bad update.

  Args:
    folder: such as `WORKDIR/bad_numbers/step_0000007`.

  Raises:
    UserError: it cannot be read, or the rows of a host are missing.
  """
  folder = pathlib.Path(folder)
  try:
    info = json.loads(read_regular(folder / _INFO_FILE).decode("utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    known = sorted(map(str, folder.parent.glob("step_*")))
    raise UserError(
      f"{folder} is no update that a run has left out ({error})."
      f"{did_you_mean(str(folder), known)}"
    ) from error
  info["metrics"] = {k: float(v) for k, v in info["metrics"].items()}
  size = len(info["examples"])
  batch: dict[str, np.ndarray] = {}
  missing = set(range(size))
  for path in sorted(folder.glob("host_*.npz")):
    with np.load(path) as arrays:
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


def _spelled(value: float) -> float | str:
  """Returns what JSON can hold; `float` reads all of it."""
  return value if math.isfinite(value) else str(value)
