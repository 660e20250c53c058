"""Reading checkpoints that a training run removes."""

import contextlib
import pathlib
import shutil
import threading
from typing import Any

import jax
import pytest

from narvl_jax.checkpointing import digests, orbax_manager, overview
from narvl_jax.checkpointing.chosen import read_chosen
from narvl_jax.checkpointing.reading import RemovedCheckpoint
from narvl_jax.checkpointing.record import stored_steps
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError
from tests.support.saved import (
  assert_equal,
  make_state,
  make_target,
  save_run,
)


def _read(checkpoints: Checkpoints, step: int) -> tuple[int, Any]:
  target = make_target(make_state(1))
  variables = {"params": target.params, "batch_stats": target.batch_stats}
  return step, checkpoints.restore_variables(step, variables, None)


def _check(found: tuple[int, Any]) -> int:
  step, variables = found
  state = make_state(step)
  expected = {"params": state.params, "batch_stats": state.batch_stats}
  assert_equal(jax.device_get(variables), jax.device_get(expected))
  return step


@pytest.mark.parametrize("moment", ["record", "digests", "arrays"])
def test_a_newer_one_is_read_instead(tmp_path, monkeypatch, moment):
  old = save_run(tmp_path)
  new = save_run(tmp_path / "elsewhere", (9,))
  # Digests are computed by several threads.
  lock = threading.Lock()

  def remove() -> None:
    """Removes the old checkpoint after a newer one exists, as a run does."""
    with lock:
      if old.exists():
        new.rename(old.with_name("9"))
        old.rename(tmp_path / "deleted")

  def removing(function: Any) -> Any:
    return lambda *args, **kwargs: (remove(), function(*args, **kwargs))[1]

  if moment == "digests":
    monkeypatch.setattr(digests, "_digest_file", removing(digests._digest_file))

  def read(checkpoints: Checkpoints, step: int) -> tuple[int, Any]:
    if moment == "record":
      remove()
    if moment == "arrays":
      manager = checkpoints._manager
      monkeypatch.setattr(manager, "restore", removing(manager.restore))
    return _read(checkpoints, step)

  found = None
  with contextlib.suppress(RemovedCheckpoint):
    found = read_chosen(tmp_path, "last", read)
  assert found is not None, "no other checkpoint was read"
  assert _check(found) == 9


@pytest.mark.parametrize("moment", ["record", "digests", "arrays"])
def test_a_named_step_is_reported_as_removed(tmp_path, monkeypatch, moment):
  save_run(tmp_path)
  folder = tmp_path / "checkpoints" / "3"

  def read(checkpoints: Checkpoints, step: int) -> tuple[int, Any]:
    if moment == "record":
      shutil.rmtree(folder)
    digest, restore = digests._digest_file, checkpoints._manager.restore

    def removed_digest(path: pathlib.Path) -> str:
      shutil.rmtree(folder, ignore_errors=True)
      return digest(path)

    def removed_restore(*args: Any, **kwargs: Any) -> Any:
      shutil.rmtree(folder)
      return restore(*args, **kwargs)

    if moment == "digests":
      monkeypatch.setattr(digests, "_digest_file", removed_digest)
    if moment == "arrays":
      monkeypatch.setattr(checkpoints._manager, "restore", removed_restore)
    return _read(checkpoints, step)

  with pytest.raises(
    UserError,
    match=r"step 3 was removed from .* while it was read, .*=best or last$",
  ):
    read_chosen(tmp_path, 3, read)


def test_a_listing_that_misses_the_only_checkpoint_is_repeated(
  tmp_path, monkeypatch
):
  """As when a run replaces its only checkpoint during the listing."""
  folder = save_run(tmp_path, (3,)).parent
  missed = iter([True])
  real_glob = pathlib.Path.glob

  def glob(path: pathlib.Path, *args: Any) -> Any:
    if path == folder and next(missed, False):
      return iter(())
    return real_glob(path, *args)

  monkeypatch.setattr(pathlib.Path, "glob", glob)
  assert stored_steps(folder) == [3]

  missed = iter([True])
  real_open = orbax_manager.open_manager

  def open_manager(*args: Any, **kwargs: Any) -> Any:
    manager = real_open(*args, **kwargs)
    if next(missed, False):
      monkeypatch.setattr(manager, "all_steps", list)
    return manager

  monkeypatch.setattr(orbax_manager, "open_manager", open_manager)
  assert _check(read_chosen(tmp_path, "last", _read)) == 3


def test_a_run_that_saves_all_the_time_can_be_read(tmp_path):
  """A writer that keeps one checkpoint, and all kinds of readers."""
  save_run(tmp_path, (1,))
  ended = threading.Event()

  def write() -> None:
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
      for step in range(2, 1000):
        if ended.is_set():
          return
        checkpoints.save(step, make_state(step), score=float(step))
        checkpoints.wait()

  thread = threading.Thread(target=write)
  thread.start()
  try:
    steps, problems = [], []
    for i in range(12):
      wanted = ("best", "last")[i % 2]
      steps.append(_check(read_chosen(tmp_path, wanted, _read)))
      overview.list_checkpoints(tmp_path)
      overview.verify(tmp_path)
      try:
        _check(read_chosen(tmp_path, steps[-1], _read))
      except UserError as error:
        problems.append(str(error))
  finally:
    ended.set()
    thread.join()
  assert all("removed" in x or "no checkpoint" in x for x in problems)
  assert steps == sorted(steps)
  assert steps[-1] > steps[0]
