"""Checkpoints, written in the background; the last and the best are kept."""

import functools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import jax
from absl import flags, logging

from narvl_jax.errors import UserError
from narvl_jax.training.train_state import (
  TrainState,
  averaged_variables,
)

FOLDER = "checkpoints"
_SCORE = "score"
# Smallest part of a replicated array that a device writes.
_MIN_SLICE_BYTES = 4 << 20
# In which all hosts must have written their parts of a checkpoint.
_SAVE_SECONDS = 1200


def _rank(metrics: Mapping[str, Any]) -> float:
  """Returns what the best checkpoint has most of; unscored ones come last."""
  score = metrics[_SCORE]
  return -math.inf if score is None else score


def _wait_with_timeouts() -> None:
  """Has Orbax wait for other hosts by name and for a limited time.

  It else does so by a collective of all devices, which waits for ever.
  """
  from orbax.checkpoint import multihost  # Defines the flag.

  del multihost
  name = "experimental_orbax_use_distributed_barrier"
  flags.FLAGS[name].value = True


@functools.cache
def _split_only_large_arrays() -> None:
  """Has Orbax write a replicated array from one device unless it is large.

  It else splits every array over all replicas, for which it compiles one
  slice for each device and shape: a minute at the first save on a CPU.
  """
  from orbax.checkpoint import type_handlers

  handler = type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES
  )
  verbosity = logging.get_verbosity()
  # It warns of what it is asked to do.
  logging.set_verbosity(logging.ERROR)
  type_handlers.register_type_handler(jax.Array, handler, override=True)
  logging.set_verbosity(verbosity)


class Checkpoints:
  """The checkpoints in `WORKDIR/checkpoints/STEP`.

  A checkpoint has the items `params` (parameters and running statistics),
  `optimizer` (its state and the step) and, if the run has them, `ema`.
  A step with a score is kept while it is the best, besides the last ones.
  """

  def __init__(
    self, workdir: str | os.PathLike[str], *, keep_last: int | None = None
  ) -> None:
    """Opens the folder.

    Args:
      workdir: the run folder.
      keep_last: number of newest checkpoints to keep; None opens the folder
        for reading only.
    """
    # Orbax takes a second to import: those who only train pay for it late.
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers

    _split_only_large_arrays()
    _wait_with_timeouts()
    self._ocp = ocp
    self._saved: int | None = None
    folder = pathlib.Path(workdir).resolve() / FOLDER
    writes = keep_last is not None
    policy = None
    if writes:
      policy = checkpoint_managers.AnyPreservationPolicy(
        [
          checkpoint_managers.LatestN(keep_last),
          checkpoint_managers.BestN(
            get_metric_fn=_rank,
            n=1,
            keep_checkpoints_without_metrics=False,
          ),
        ]
      )
    self._manager = ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=_rank,
        # Not `read_only`, about which orbax warns: it writes only in `save`.
        create=writes,
        async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
      ),
      item_handlers={
        name: ocp.StandardCheckpointHandler()
        for name in ("params", "optimizer", "ema")
      },
    )

  @property
  def last_step(self) -> int | None:
    """The newest step, None if there is none."""
    return self._manager.latest_step()

  @property
  def best_step(self) -> int | None:
    """The step with the best score, None if none has one."""
    step = self._manager.best_step()
    if step is None:
      return None
    scored = (self._manager.metrics(step) or {}).get(_SCORE) is not None
    return step if scored else None

  def steps(self) -> list[int]:
    """Returns the steps on disk in order."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, state: TrainState, *, score: float | None = None
  ) -> None:
    """Copies the state and writes it in the background.

    Args:
      step: number of updates, the name of the checkpoint.
      state: may be donated as soon as this returns.
      score: of the evaluation at this step, higher is better; None if there
        was none.
    """
    save = self._ocp.args.StandardSave
    items = {
      "params": save(
        {"params": state.params, "batch_stats": state.batch_stats}
      ),
      "optimizer": save({"step": state.step, "opt_state": state.opt_state}),
    }
    if state.ema is not None:
      items["ema"] = save(state.ema)
    self._manager.save(
      step,
      args=self._ocp.args.Composite(**items),
      # Orbax warns about every checkpoint without metrics.
      metrics={_SCORE: score},
      force=True,
    )
    self._saved = step

  def save_variables(self, step: int, variables: Mapping[str, Any]) -> None:
    """Writes weights only, which can be evaluated but not trained on.

    Args:
      step: the name of the checkpoint.
      variables: {"params", "batch_stats"} of arrays.
    """
    args = self._ocp.args
    self._manager.save(
      step,
      args=args.Composite(params=args.StandardSave(dict(variables))),
      metrics={_SCORE: None},
      force=True,
    )

  def shapes(self, step: int) -> dict[str, Any]:
    """Returns what a checkpoint holds, without reading the values.

    Args:
      step: one of `steps()`.

    Returns:
      "params" and, if there are any, "ema": trees of objects with `shape` and
      `dtype`; each has {"params", "batch_stats"}.
    """
    found = self._manager.item_metadata(step)
    items = {name: found.get(name) for name in ("params", "ema")}
    return {name: item.tree for name, item in items.items() if item is not None}

  @property
  def progress(self) -> str:
    """Which step this process saved last, and whether it is on disk yet."""
    if self._saved is None:
      return "none"
    saving = self._manager.is_saving_in_progress()
    return f"{'saving' if saving else 'saved'} {self._saved}"

  def restore(self, step: int, target: TrainState) -> TrainState:
    """Reads a whole state.

    Args:
      step: one of `steps()`.
      target: shapes, dtypes and shardings of the state
        (`jax.ShapeDtypeStruct`s).

    Raises:
      UserError: it holds weights only.
    """
    if self._manager.item_metadata(step).get("optimizer") is None:
      raise UserError(
        f"the checkpoint {step} holds weights but no state of an optimizer, so"
        " no run can go on from it; start one with --config.init_from=FOLDER"
        " and another --workdir"
      )
    restore = self._ocp.args.StandardRestore
    items = {
      "params": restore(
        {"params": target.params, "batch_stats": target.batch_stats}
      ),
      "optimizer": restore(
        {"step": target.step, "opt_state": target.opt_state}
      ),
    }
    if target.ema is not None:
      items["ema"] = restore(target.ema)
    read = self._manager.restore(step, args=self._ocp.args.Composite(**items))
    return TrainState(
      step=read["optimizer"]["step"],
      params=read["params"]["params"],
      batch_stats=read["params"]["batch_stats"],
      opt_state=read["optimizer"]["opt_state"],
      ema=read["ema"] if target.ema is not None else None,
    )

  def restore_variables(
    self, step: int, target: Mapping[str, Any], ema: Mapping[str, Any] | None
  ) -> dict[str, Any]:
    """Reads the variables to evaluate, averaged ones if the run has them.

    Args:
      step: one of `steps()`.
      target: shapes of {"params", "batch_stats"}.
      ema: shapes of {"params", "batch_stats"} of the averages, or None.
    """
    restore = self._ocp.args.StandardRestore
    items = {"params": restore(dict(target))}
    if ema is not None:
      items["ema"] = restore(dict(ema))
    read = self._manager.restore(step, args=self._ocp.args.Composite(**items))
    if ema is None:
      return read["params"]
    return averaged_variables(read["params"]["params"], read["ema"])

  def wait(self) -> None:
    """Blocks until everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Finishes what is being written and closes the folder."""
    self._manager.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def choose_step(checkpoints: Checkpoints, wanted: str | int) -> int:
  """Returns the step that "best", "last" or a number stands for.

  "best" is the last one while no checkpoint has a score.

  Raises:
    UserError: the run has no such checkpoint.
  """
  steps = checkpoints.steps()
  if not steps:
    raise UserError(
      "this run has no checkpoint yet; train it first, or give another"
      " --workdir"
    )
  if wanted == "last":
    return steps[-1]
  if wanted == "best":
    best = checkpoints.best_step
    return steps[-1] if best is None else best
  try:
    number = int(wanted)
  except ValueError:
    number = -1
  if number not in steps:
    raise UserError(
      f'no checkpoint "{wanted}"; this run has'
      f" {', '.join(map(str, steps))}, or say best or last (--checkpoint)"
    )
  return number


def restore_target(abstract: Any, shardings: Any) -> Any:
  """Returns the shapes of a tree with the shardings to restore it to."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    abstract,
    shardings,
  )
