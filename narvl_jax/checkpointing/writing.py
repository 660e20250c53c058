"""Checkpoints, written in the background and checked before they are used."""

import contextlib
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from narvl_jax.checkpointing import record as record_lib
from narvl_jax.checkpointing.checksums import device_checksums, text
from narvl_jax.checkpointing.fit import leaf_of
from narvl_jax.checkpointing.host_memory import return_free_memory
from narvl_jax.checkpointing.integrity import (
  Damage,
  replace_record,
  write_digests,
)
from narvl_jax.checkpointing.reading import (
  FOLDER,
  StoredCheckpoints,
  state_items,
)
from narvl_jax.checkpointing.record import CheckpointRecord, name_leaves
from narvl_jax.checkpointing.retention import Policy, Retention
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import to_json
from narvl_jax.files.disk import explain_disk
from narvl_jax.files.held_folder import HeldFolder
from narvl_jax.hosts import distributed
from narvl_jax.state.train_state import TrainState

__all__ = ["FOLDER", "Checkpoints", "restore_target"]

# Of the run folder; where checkpoints go that are not what was written.
DAMAGED_FOLDER = "damaged"
_LAST_WORDS_SECONDS = 5.0
# What writes already when a save fails has ended after so many of so long.
_REMOVALS = 5
_REMOVAL_SECONDS = 0.1


class Checkpoints(StoredCheckpoints):
  """Checkpoints that can also be saved.

  Attributes:
    set_aside: what was wrong with the checkpoints that `set_aside_damaged`
      took away in this process.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep_last: int | None = None,
    keep_best: int = 1,
    keep_every: int = 0,
    config: Any = None,
    vocabulary: str | None = None,
  ) -> None:
    """Opens the folder.

    Args:
      workdir: the run folder.
      keep_last: number of newest checkpoints to keep; None opens the folder
        for reading only.
      keep_best: number of those with the highest scores to keep besides.
      keep_every: keeps those of every such step; 0: none.
      config: of the run, to be stored with every checkpoint.
      vocabulary: its fingerprint, likewise.
    """
    self._config = None if config is None else to_json(config)
    self._vocabulary = vocabulary
    self._saved: int | None = None
    self._completion: _Completion | None = None
    self._error: BaseException | None = None
    self._failed = False
    self.set_aside: list[str] = []
    self._policy = None
    self._held: HeldFolder | None = None
    if keep_last is not None:
      retention = Retention(keep_last, keep_best, keep_every)
      self._policy = Policy(retention, lambda: self._scores)
      # A run that goes on looks for itself.
      self._advises = False
      self._held = HeldFolder(pathlib.Path(workdir).resolve() / FOLDER)
    super().__init__(workdir)
    if self._policy is not None:
      self._remove_deleted()

  def _open(self) -> Any:
    if self._held is None:
      return super()._open()
    # Orbax makes the folders above what it writes, should they have vanished.
    return self._orbax.open_manager(
      self._held.path, self._policy, self._note_error
    )

  @property
  def last_step(self) -> int | None:
    """The newest step, None if there is none."""
    return self._manager.latest_step()

  def prepare(self, state: TrainState) -> None:
    """Compiles what `save` needs, which else holds the loop at the first one.

    Args:
      state: one like those that are to be saved.
    """
    device_checksums(list(name_leaves(state_items(state)).values()))

  def save(
    self,
    step: int,
    state: TrainState,
    *,
    score: float | None = None,
    run: Mapping[str, Any] | None = None,
  ) -> None:
    """Copies the state and writes it in the background.

    Args:
      step: number of updates, the name of the checkpoint.
      state: may be donated as soon as this returns.
      score: of the evaluation at this step, higher is better; None if there
        was none.
      run: where the run stands beside its state, anything that JSON can hold.

    Raises:
      UserError: this or the last one could not be written; see
        `check_errors`.
    """
    self._save(step, state_items(state), score, run)

  def save_variables(self, step: int, variables: Mapping[str, Any]) -> None:
    """Writes weights only, which can be evaluated but not trained on.

    Args:
      step: the name of the checkpoint.
      variables: {"params", "batch_stats"} of arrays.
    """
    self._save(step, {"params": dict(variables)}, None, None)

  def _save(
    self,
    step: int,
    items: Mapping[str, Any],
    score: float | None,
    run: Mapping[str, Any] | None,
  ) -> None:
    self.wait()
    arrays = name_leaves(items)
    leaves = {
      name: leaf_of(leaf, text(checksum))
      for (name, leaf), checksum in zip(
        arrays.items(), device_checksums(list(arrays.values())), strict=True
      )
    }
    score = None if score is None else float(score)
    self._scores[step] = score
    record = CheckpointRecord(
      step, score, dict(run or {}), self._config, leaves, self._vocabulary
    )
    args = self._orbax.ocp.args
    try:
      self._manager.save(
        step,
        args=args.Composite(
          **{
            name: self._orbax.SaveArrays(item) for name, item in items.items()
          },
          **{record_lib.ITEM: args.JsonSave(record_lib.to_json(record))},
        ),
        force=True,
      )
    except Exception as error:
      raise self._failure(step, error) from error
    self._saved = step
    self._completion = _Completion(step, self._complete)
    self._completion.start()

  def set_score(
    self, step: int, score: float | None, run: Mapping[str, Any]
  ) -> None:
    """Changes what is stored with the arrays of a checkpoint.

    Args:
      step: of a checkpoint that is intact.
      score: of its evaluation, see `save`.
      run: likewise.
    """
    record = self.read_record(step)
    # Nobody reads it any more.
    distributed.barrier("record read")
    if distributed.is_first():
      changed = record._replace(score=score, run=dict(run))
      replace_record(self._folder / str(step), changed)
    distributed.barrier("record replaced")
    self._scores[step] = score
    if self._policy is None:
      return
    # As if it had been saved with its score: an earlier best one may go.
    reasons = self._policy.retention.reasons(self.steps(), self._scores)
    for other in [x for x, kept in reasons.items() if not kept]:
      self._manager.delete(other)
    self._remove_deleted()

  def _complete(self, step: int) -> None:
    """Waits until a checkpoint is on disk; writes its digests."""
    self._manager.wait_until_finished()
    if self._held is not None and not self._held.in_place:
      raise FolderLostError
    hosts = jax.process_count()
    write_digests(self._folder / str(step), jax.process_index(), hosts)
    self._remove_deleted()
    return_free_memory()

  def _remove_deleted(self) -> None:
    """Removes checkpoints that are no longer kept, also of a killed run."""
    if distributed.is_first():
      shutil.rmtree(self._folder / self._orbax.DELETED, ignore_errors=True)

  def _note_error(self, error: BaseException) -> None:
    self._error = error

  def check_errors(self) -> None:
    """Raises what went wrong since the last save, if anything did.

    Raises:
      UserError: naming the step and what the disk says.
      RuntimeError: naming the step, for what nobody expected.
    """
    completion = self._completion
    if completion is None:
      return
    # Where there are other hosts, the completion waits for them.
    error = self._error or completion.error
    if error is not None:
      # Here it ends, too, and writes no more; others may keep it waiting.
      completion.join(_LAST_WORDS_SECONDS)
      self._completion = None
      raise self._failure(completion.step, error) from error

  def _failure(self, step: int, error: BaseException) -> Exception:
    """Returns the error to raise; nothing is left of the checkpoint."""
    self._failed = True
    assert self._held is not None
    self._held.name_files(error)
    # What the manager knows is already that of a save that went well.
    saved = record_lib.stored_steps(self._held.path)
    what = f"the checkpoint of step {step} could not be saved"
    # Before anything is removed, so that it is told how full the disk was.
    reason = explain_disk(error, self._workdir)
    if self._held.in_place:
      self._held.cut_off()
      if distributed.is_first():
        self._remove_parts(step)
    else:
      reason = (
        f"the folder {self._folder} was renamed or removed meanwhile; bring it"
        " back"
      )
    if reason is None:
      kind = type(error).__name__
      return RuntimeError(f"{what}: {kind}: {' '.join(str(error).split())}")
    then = f"it goes on from step {saved[-1]}" if saved else "it starts anew"
    return UserError(
      f"{what}: {reason}, and run the same command again: {then}"
    )

  def _remove_parts(self, step: int) -> None:
    """Removes what a failed save has written, also what comes a bit later."""
    for _ in range(_REMOVALS):
      for part in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        shutil.rmtree(part, ignore_errors=True)
      time.sleep(_REMOVAL_SECONDS)

  @property
  def progress(self) -> str:
    """Which step was saved last, and whether it is on disk yet."""
    if self._saved is None:
      return "none" if self.last_step is None else f"saved {self.last_step}"
    saving = self._completion is not None and self._completion.is_alive()
    return f"{'saving' if saving else 'saved'} {self._saved}"

  def set_aside_damaged(self, damages: Mapping[int, Damage]) -> None:
    """Moves checkpoints to `WORKDIR/damaged`, so that nobody uses them.

    Args:
      damages: step -> what is wrong with it, the same on all hosts.
    """
    distributed.barrier("damaged checkpoints found")
    for step, damage in damages.items():
      target = _unused(self._workdir / DAMAGED_FOLDER / str(step))
      self.set_aside.append(f"step {step}: {damage}; now in {target}")
      if distributed.is_first():
        target.parent.mkdir(exist_ok=True)
        (self._folder / str(step)).rename(target)
    distributed.barrier("damaged checkpoints set aside")
    # Its `reload` would read files of the others, which may be damaged too.
    self._manager.close()
    self._manager = self._open()

  def wait(self) -> None:
    """Blocks until everything saved is on disk.

    Raises:
      UserError: it cannot be written; see `check_errors`.
    """
    self.check_errors()
    while self._completion is not None:
      self._completion.join(1.0)
      alive = self._completion.is_alive()
      self.check_errors()
      if not alive:
        self._completion = None

  def close(self) -> None:
    """Finishes what is being written and closes the folder."""
    if not self._failed:
      self.wait()
      self._manager.close()
      if self._held is not None:
        self._held.close()

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # What ended the block is not to be hidden by what follows from it.
    with contextlib.suppress(*(() if kind is None else (Exception,))):
      self.close()


class FolderLostError(Exception):
  """The folder that was written to no longer has its name."""


class _Completion(threading.Thread):
  """The part of a save that nobody waits for.

  Attributes:
    step: what is saved.
    error: what went wrong, None while nothing did.
  """

  def __init__(self, step: int, complete: Callable[[int], None]) -> None:
    super().__init__(name="checkpoint completion", daemon=True)
    self.step = step
    self.error: BaseException | None = None
    self._complete = complete

  def run(self) -> None:
    try:
      self._complete(self.step)
    except BaseException as error:
      self.error = error


def _unused(path: pathlib.Path) -> pathlib.Path:
  """Returns a path, with a number behind it if there is something there."""
  number = 1
  target = path
  while target.exists():
    number += 1
    target = path.with_name(f"{path.name}.{number}")
  return target


def restore_target(abstract: Any, shardings: Any) -> Any:
  """Returns the shapes of a tree with the shardings to restore it to."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    abstract,
    shardings,
  )
