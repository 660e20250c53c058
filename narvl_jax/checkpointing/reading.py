"""Reading checkpoints: which steps exist, and their arrays if intact."""

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import flax.traverse_util
import jax
import numpy as np

from narvl_jax.checkpointing import record as record_lib
from narvl_jax.checkpointing.checksums import device_checksums
from narvl_jax.checkpointing.digests import has_digests
from narvl_jax.checkpointing.host_memory import large_blocks_returned
from narvl_jax.checkpointing.integrity import (
  Damage,
  DamagedCheckpoint,
  compare_leaves,
  examine,
)
from narvl_jax.checkpointing.record import CheckpointRecord, name_leaves
from narvl_jax.checkpointing.record_checks import check_arrays
from narvl_jax.checkpointing.retention import ranked
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.hosts import distributed
from narvl_jax.state.train_state import TrainState, averaged_variables

FOLDER = "checkpoints"
# Attempts to list a folder that a training run changes at the same time.
_OPENING_ATTEMPTS = 5


class RemovedCheckpoint(UserError):
  """A checkpoint was removed after its folder was opened."""


class StoredCheckpoints:
  """The checkpoints in `WORKDIR/checkpoints/STEP`; see `record`.

  Arrays are read directly to their devices. Files are verified before they are
  read, and arrays, on the devices, before they are returned.
  """

  # Whether the error of a damaged checkpoint names an intact one.
  _advises = True

  def __init__(self, workdir: str | os.PathLike[str]) -> None:
    """Opens the folder of a run; creates nothing."""
    # The import of Orbax takes seconds.
    from narvl_jax.checkpointing import orbax_manager

    self._orbax = orbax_manager
    self._workdir = as_path(workdir).resolve()
    self._folder = self._workdir / FOLDER
    self._manager = self._open_patiently()
    self._scores = {step: self._read_score(step) for step in self.steps()}

  def _open(self) -> Any:
    return self._orbax.open_manager(self._folder)

  def _open_patiently(self) -> Any:
    """Opens the folder, which a training run may change at the same time.

    Orbax's listing may name a checkpoint that is removed before it is looked
    up, or miss all of them, see `record.stored_steps`.
    """
    for _ in range(_OPENING_ATTEMPTS - 1):
      with contextlib.suppress(FileNotFoundError):
        manager = self._open()
        if manager.all_steps() or not record_lib.stored_steps(self._folder):
          return manager
        manager.close()
    return self._open()

  @property
  def workdir(self) -> pathlib.Path:
    """The run folder."""
    return self._workdir

  @property
  def best_step(self) -> int | None:
    """The step with the best score; None if none has a score."""
    return next(iter(ranked(self.steps(), self._scores)), None)

  def steps(self) -> list[int]:
    """Returns the steps on disk in order."""
    return sorted(self._manager.all_steps())

  def read_record(self, step: int) -> CheckpointRecord:
    """Reads the record of a checkpoint.

    Raises:
      DamagedCheckpoint: the record cannot be read.
    """
    self.wait()
    try:
      return record_lib.read_record(self._folder / str(step))
    except (OSError, record_lib.BrokenRecord) as error:
      damage = self.damage(step)
      assert damage is not None
      raise self._rejection(step, damage) from error

  def _read_score(self, step: int) -> float | None:
    try:
      return record_lib.read_record(self._folder / str(step)).score
    except (OSError, record_lib.BrokenRecord):
      return None

  def shapes(self, step: int) -> dict[str, Any]:
    """Returns the shapes of the variables in a checkpoint.

    Returns:
      "params" and, if there are any, "ema": trees {"params", "batch_stats"} of
      `jax.ShapeDtypeStruct`.
    """
    found: dict[str, Any] = {}
    for name, leaf in self.read_record(step).leaves.items():
      item = record_lib.item_of(name)
      if item != "optimizer":
        path = name.removeprefix("ema/")
        shape = jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
        found.setdefault(item, {})[path] = shape
    return {
      item: flax.traverse_util.unflatten_dict(leaves, sep="/")
      for item, leaves in found.items()
    }

  def damage(self, step: int) -> Damage | None:
    """Returns the damage of a checkpoint on disk, equal on all hosts."""
    self.wait()
    place = self._folder / str(step)
    try:
      found = examine(place, jax.process_index(), jax.process_count(), _gather)
    except OSError as error:
      if record_lib.is_stored(place):
        raise
      raise self._removed(step) from error
    if found is not None and not record_lib.is_stored(place):
      raise self._removed(step)
    return found

  def restore(self, step: int, target: TrainState) -> TrainState:
    """Reads a whole state.

    Args:
      target: shapes, dtypes and shardings (`jax.ShapeDtypeStruct`).

    Raises:
      DamagedCheckpoint: it was changed after the save.
      UserError: it contains weights only, or the state of another model.
    """
    items = state_items(target)
    record = self.read_record(step)
    if not any(record_lib.item_of(x) == "optimizer" for x in record.leaves):
      raise UserError(
        f"the checkpoint {step} contains weights but no state of an optimizer,"
        " so"
        " no run can resume from it; start one with --config.init_from=FOLDER"
        " and another --workdir"
      )
    check_arrays(record, name_leaves(items), self._workdir)
    read = self._read(step, record, items)
    return TrainState(
      step=read["optimizer"]["step"],
      params=read["params"]["params"],
      batch_stats=read["params"]["batch_stats"],
      opt_state=read["optimizer"]["opt_state"],
      ema=read.get("ema"),
    )

  def restore_variables(
    self, step: int, target: Mapping[str, Any], ema: Mapping[str, Any] | None
  ) -> dict[str, Any]:
    """Reads the variables to evaluate, converted to the dtypes of the target.

    Args:
      target: shapes of {"params", "batch_stats"}.
      ema: shapes of {"params", "batch_stats"} of the moving averages, which
        then take precedence, or None.

    Raises:
      DamagedCheckpoint: it was changed after the save.
      UserError: it contains the variables of another model.
    """
    items = {"params": dict(target)}
    if ema is not None:
      items["ema"] = dict(ema)
    record = self.read_record(step)
    check_arrays(record, name_leaves(items), self._workdir, dtypes=False)
    read = self._read(step, record, items)
    if ema is None:
      return read["params"]
    return averaged_variables(read["params"]["params"], read["ema"])

  def _read(
    self, step: int, record: CheckpointRecord, items: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Reads items and compares them with their checksums."""
    damage = self.damage(step)
    if damage is not None:
      raise self._rejection(step, damage)
    args = self._orbax.ocp.args.Composite(
      **{
        # In the stored dtypes, to which the checksums refer.
        name: self._orbax.RestoreArrays(_as_stored(item, name, record))
        for name, item in items.items()
      }
    )
    try:
      with large_blocks_returned():
        found = dict(self._manager.restore(step, args=args))
    except Exception as error:
      if not record_lib.is_stored(self._folder / str(step)):
        raise self._removed(step) from error
      # Without digests only the arrays were verified.
      if has_digests(self._folder / str(step)):
        raise
      what = f"cannot be read: {' '.join(str(error).split())[:200]}"
      raise self._rejection(step, Damage([[f"{step}/", what]], [])) from error
    sums = device_checksums(list(name_leaves(found).values()))
    different = compare_leaves(record, list(name_leaves(items)), sums)
    if different:
      raise self._rejection(step, Damage([], different))
    return {
      name: jax.tree.map(_as_wanted, found[name], item)
      for name, item in items.items()
    }

  def _removed(self, step: int) -> RemovedCheckpoint:
    return RemovedCheckpoint(
      f"the checkpoint of step {step} was removed from {self._folder} while it"
      " was read, as a training run does with old ones; choose one that is"
      " kept: --checkpoint=best or last"
    )

  def _is_intact(self, step: int) -> bool:
    try:
      return self.damage(step) is None
    except RemovedCheckpoint:
      return False

  def _rejection(self, step: int, damage: Damage) -> UserError:
    """Returns the error of a damaged checkpoint; it names an intact one."""
    if not record_lib.is_stored(self._folder / str(step)):
      return self._removed(step)
    if not self._advises:
      return DamagedCheckpoint(step, damage)
    others = sorted(set(self.steps()) - {step}, key=lambda x: (step - x) ** 2)
    intact = next((x for x in others if self._is_intact(x)), None)
    advice = "no other one of this run is intact"
    if intact is not None:
      advice = f"the nearest one that is intact: --checkpoint={intact}"
    return DamagedCheckpoint(step, damage, advice)

  def wait(self) -> None:
    """Blocks until everything saved is on disk."""

  def close(self) -> None:
    """Closes the folder."""
    self._manager.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def restore_target(abstract: Any, shardings: Any) -> Any:
  """Adds shardings to the shapes of a tree."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    abstract,
    shardings,
  )


def state_items(state: TrainState) -> dict[str, Any]:
  """Returns the items of a checkpoint that contain the parts of a state."""
  items = {
    "params": {"params": state.params, "batch_stats": state.batch_stats},
    "optimizer": {"step": state.step, "opt_state": state.opt_state},
  }
  if state.ema is not None:
    items["ema"] = state.ema
  return items


def _as_stored(tree: Any, item: str, record: CheckpointRecord) -> Any:
  """Replaces the dtypes of an item by those on disk."""
  names = iter(name_leaves({item: tree}))

  def stored(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = record.leaves[next(names)].dtype
    # NumPy does not know names such as "key<fry>".
    same = str(leaf.dtype) == dtype
    return jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype if same else np.dtype(dtype),
      sharding=leaf.sharding,
    )

  return jax.tree.map(stored, tree)


def _as_wanted(array: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
  same = array.dtype == target.dtype
  return array if same else array.astype(target.dtype)


def _gather(value: Any) -> list[Any]:
  """Gathers a value of all hosts, some of which take longer than others."""
  distributed.barrier("checkpoint examined")
  return distributed.gather_json(value)
