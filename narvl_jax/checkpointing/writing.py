"""Saving checkpoints in the background."""

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from narvl_jax.checkpointing import record as record_lib
from narvl_jax.checkpointing.checksums import device_checksums, text
from narvl_jax.checkpointing.digests import replace_record, write_digests
from narvl_jax.checkpointing.held_folder import HeldFolder, HeldStore, hold
from narvl_jax.checkpointing.host_memory import return_free_memory
from narvl_jax.checkpointing.integrity import Damage
from narvl_jax.checkpointing.reading import (
  FOLDER,
  StoredCheckpoints,
  restore_target,
  state_items,
)
from narvl_jax.checkpointing.record import (
  ArrayRecord,
  CheckpointRecord,
  name_leaves,
)
from narvl_jax.checkpointing.retention import Retention
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import to_json
from narvl_jax.files import leftovers
from narvl_jax.files.disk_errors import explain_disk
from narvl_jax.files.schemes import StoreError
from narvl_jax.files.stores import as_path
from narvl_jax.hosts import distributed
from narvl_jax.state.train_state import TrainState

__all__ = ["FOLDER", "Checkpoints", "restore_target"]

# Subfolder of the run folder.
DAMAGED_FOLDER = "damaged"
# Seconds that a failed save waits for its completion thread.
_LAST_WORDS_SECONDS = 5.0
# Writes in flight when a save fails end within this many removals.
_REMOVALS = 5
_REMOVAL_SECONDS = 0.1


class Checkpoints(StoredCheckpoints):
  """Checkpoints that can also be saved.

  Attributes:
    set_aside: a line for each checkpoint that `set_aside_damaged` moved away
      in this process.
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
      keep_last: number of newest checkpoints to keep; None opens the folder
        for reading only.
      keep_best: number of checkpoints with the highest scores to keep.
      keep_every: steps divisible by this are kept; 0: none.
      config: config of the run, stored with every checkpoint.
      vocabulary: fingerprint of the vocabulary, stored with it.
    """
    self._config = None if config is None else to_json(config)
    self._vocabulary = vocabulary
    self._saved: int | None = None
    self._completion: _Completion | None = None
    self._error: BaseException | None = None
    self._failed = False
    self.set_aside: list[str] = []
    self._retention: Retention | None = None
    self._held: HeldFolder | HeldStore | None = None
    if keep_last is not None:
      self._retention = Retention(keep_last, keep_best, keep_every)
      # A resumed run looks for an intact one itself.
      self._advises = False
      self._held = hold(as_path(workdir).resolve() / FOLDER)
    super().__init__(workdir)
    if self._retention is not None:
      self._remove_deleted()

  def _open(self) -> Any:
    if self._held is None:
      return super()._open()
    # Orbax would create the folder again if it was renamed or removed.
    return self._orbax.open_manager(
      self._held.path, self._reasons, self._note_error
    )

  def _reasons(self, steps: list[int]) -> dict[int, list[str]]:
    assert self._retention is not None
    return self._retention.reasons(steps, self._scores)

  @property
  def last_step(self) -> int | None:
    """The newest step; None if there is none."""
    return self._manager.latest_step()

  def prepare(self, state: TrainState) -> None:
    """Compiles the programs that the first `save` of such a state needs."""
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
      score: score of the evaluation at this step, higher is better; None if it
        was not evaluated.
      run: JSON values, see `CheckpointRecord`.

    Raises:
      UserError: this or the previous one could not be written; see
        `check_errors`.
    """
    self._save(step, state_items(state), score, run)

  def save_variables(self, step: int, variables: Mapping[str, Any]) -> None:
    """Writes weights only, which can be evaluated but not resumed from.

    Args:
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
    checksums = device_checksums(list(arrays.values()))
    leaves = {
      name: ArrayRecord(tuple(leaf.shape), str(leaf.dtype), text(checksum))
      for (name, leaf), checksum in zip(arrays.items(), checksums, strict=True)
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
    """Replaces score and progress of an intact checkpoint."""
    record = self.read_record(step)
    distributed.barrier("record read")
    if distributed.is_first():
      changed = record._replace(score=score, run=dict(run))
      replace_record(self._folder / str(step), changed)
    distributed.barrier("record replaced")
    self._scores[step] = score
    if self._retention is None:
      return
    # As after a save with this score: a previous best one may be removed.
    for other, reasons in self._reasons(self.steps()).items():
      if not reasons:
        self._manager.delete(other)
    self._remove_deleted()

  def _complete(self, step: int) -> None:
    """Waits until a checkpoint is on disk; writes its digests."""
    self._manager.wait_until_finished()
    if self._held is not None:
      self._held.check_in_place()
    hosts = jax.process_count()
    write_digests(self._folder / str(step), jax.process_index(), hosts)
    self._remove_deleted()
    return_free_memory()

  def _remove_deleted(self) -> None:
    """Removes checkpoints that are no longer kept, also of a killed run."""
    if distributed.is_first():
      leftovers.remove(self._folder / self._orbax.DELETED)

  def _note_error(self, error: BaseException) -> None:
    self._error = error

  def check_errors(self) -> None:
    """Raises the error of the save in progress, if it failed.

    Raises:
      UserError: the disk failed; the error names the step and the cause.
      RuntimeError: an unexpected error; it names the step.
    """
    completion = self._completion
    if completion is None:
      return
    # `_error` is known earlier: the completion waits for the other hosts.
    error = self._error or completion.error
    if error is not None:
      completion.join(_LAST_WORDS_SECONDS)
      self._completion = None
      raise self._failure(completion.step, error) from error

  def _failure(self, step: int, error: BaseException) -> Exception:
    """Returns the error to raise; removes the parts of the checkpoint."""
    self._failed = True
    assert self._held is not None
    self._held.name_files(error)
    # The manager already lists the failed step.
    saved = []
    with contextlib.suppress(StoreError):
      saved = record_lib.stored_steps(self._held.path)
    what = f"the checkpoint of step {step} could not be saved"
    # Before the removal, so that it reports how full the disk was.
    reason = explain_disk(error, self._workdir)
    if self._held.in_place:
      self._held.cut_off()
      if distributed.is_first():
        self._remove_parts(step)
    else:
      gone = f"the folder {self._folder} was renamed or removed meanwhile"
      reason = f"{gone}; restore it"
    if reason is None:
      kind = type(error).__name__
      return RuntimeError(f"{what}: {kind}: {' '.join(str(error).split())}")
    then = f"resumes from step {saved[-1]}" if saved else "starts from step 0"
    return UserError(
      f"{what}: {reason}, and run the same command again: it {then}"
    )

  def _remove_parts(self, step: int) -> None:
    """Removes the files of a failed save, including those written later."""
    for _ in range(_REMOVALS):
      for part in record_lib.unfinished(self._folder, step):
        leftovers.remove(part)
      time.sleep(_REMOVAL_SECONDS)

  @property
  def progress(self) -> str:
    """The last saved step, and whether it is on disk already."""
    if self._saved is None:
      return "none" if self.last_step is None else f"saved {self.last_step}"
    saving = self._completion is not None and self._completion.is_alive()
    return f"{'saving' if saving else 'saved'} {self._saved}"

  def set_aside_damaged(self, damages: Mapping[int, Damage]) -> None:
    """Moves checkpoints to `WORKDIR/damaged`.

    Args:
      damages: step -> its damage, equal on all hosts.
    """
    distributed.barrier("damaged checkpoints found")
    for step, damage in damages.items():
      target = _unused(self._workdir / DAMAGED_FOLDER / str(step))
      self.set_aside.append(f"step {step}: {damage}; now in {target}")
      if distributed.is_first():
        target.parent.mkdir(exist_ok=True)
        (self._folder / str(step)).rename(target)
    distributed.barrier("damaged checkpoints set aside")
    # Not `reload`: it reads files of the others, which may be damaged too.
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
    """Waits for the save in progress and closes the folder."""
    if not self._failed:
      self.wait()
      self._manager.close()
      if self._held is not None:
        self._held.close()

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # An error of `close` must not hide the one that ended the block.
    with contextlib.suppress(*(() if kind is None else (Exception,))):
      self.close()


class _Completion(threading.Thread):
  """Completes the save of `step`; `error` is its error, or None."""

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
  """Returns the path, with a number appended if it exists."""
  number, target = 1, path
  while target.exists():
    number += 1
    target = path.with_name(f"{path.name}.{number}")
  return target
