"""Failed saves, and files of killed processes."""

import dataclasses
import errno
import gc
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.checkpointing import integrity, orbax_manager
from narvl_jax.checkpointing import writing as checkpoints_lib
from narvl_jax.checkpointing.held_folder import HeldFolder
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError
from narvl_jax.state.train_state import TrainState
from tests.support import disks
from tests.support.saved import make_state, save_run


def _fail_digests(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
  def fail(*_: object) -> None:
    raise error

  monkeypatch.setattr(checkpoints_lib, "write_digests", fail)


def _save(checkpoints: Checkpoints, step: int, state: TrainState) -> None:
  checkpoints.save(step, state)
  checkpoints.wait()


def test_leftovers_of_killed_processes_go(tmp_path):
  save_run(tmp_path)
  folder = tmp_path / "checkpoints"
  (folder / ".deleted" / "2").mkdir(parents=True)
  (folder / "8.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    assert checkpoints.last_step == 6
    checkpoints.save(9, make_state(9))
  assert {x.name for x in folder.iterdir()} == {"6", "9"}


def test_a_failed_save_is_reported_at_the_next_step(tmp_path, monkeypatch):
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    _save(checkpoints, 3, make_state(3))
    checkpoints.check_errors()
    _fail_digests(monkeypatch, full)
    checkpoints.save(6, make_state(6))
    while checkpoints.progress == "saving 6":
      time.sleep(0.01)
    with pytest.raises(
      UserError,
      match=r"the checkpoint of step 6 could not be saved: .*No space left on"
      r" device \([\d,]+ bytes are free .*; make room, and run the same command"
      # Only the digests are missing.
      r" again: it resumes from step 6",
    ):
      checkpoints.check_errors()
    # Reported once.
    checkpoints.check_errors()


def test_a_file_that_cannot_grow_ends_the_save(tmp_path):
  # C++ reaches the limit of the process, as it reaches a full disk.
  rng = np.random.default_rng(0)
  large = {"kernel": jnp.asarray(rng.normal(size=(512, 1024)), jnp.float32)}
  state = dataclasses.replace(make_state(3), params=large)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    _save(checkpoints, 3, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
      with pytest.raises(
        UserError,
        match=r"step 6 could not be saved: .*File too large.* from step 3",
      ):
        _save(checkpoints, 6, state)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert [x.name for x in (tmp_path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.usefixtures("_quiet")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
  ("fails", "reason"),
  [
    (disks.read_only, r"Read-only file system \(.*; make it writable again"),
    (
      disks.use_all_files,
      r"the disk can hold no more files \([\d,]+ bytes are free, but no inode"
      r".*; remove some, or have the number of inodes raised",
    ),
  ],
)
def test_a_disk_that_fails_during_a_run(tmp_path, fails, reason):
  before = set(threading.enumerate())
  with disks.small_disk(tmp_path / "disk", 4000, files=200) as disk:
    with Checkpoints(disk, keep_last=2) as checkpoints:
      _save(checkpoints, 3, make_state(3))
      fails(disk)
      with pytest.raises(
        UserError, match=rf"step 6 could not be saved: .*{reason}.* from step 3"
      ):
        _save(checkpoints, 6, make_state(6))
    names = {path.name for path in (disk / "checkpoints").iterdir()}
    assert "3" in names
    assert "6" not in names
  # At exit Python would wait minutes for a thread that is not a daemon.
  assert not {x for x in threading.enumerate() if not x.daemon} - before


@pytest.fixture
def _quiet() -> Iterator[None]:
  """Drops leftovers of a failed save, see `explain.quiet_failed_saves`."""
  yield
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gc.collect()


@pytest.mark.usefixtures("_quiet")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["rename", "remove"])
@pytest.mark.parametrize("moment", ["before", "write", "finalize"])
def test_a_folder_removed_during_a_save_is_not_created_again(
  tmp_path, monkeypatch, moment, how
):
  """The save is completed in the renamed folder, or nowhere."""
  run, other = tmp_path / "run", tmp_path / "other"

  def vanish() -> None:
    if not run.exists():
      return
    run.rename(other)
    # The save may add a file while the folder is removed.
    while how == "remove" and other.exists():
      shutil.rmtree(other, ignore_errors=True)

  handler = orbax_manager._ArrayHandler
  async_save, finalize = handler.async_save, handler.finalize

  async def vanish_and_save(self: Any, *args: Any, **kwargs: Any) -> Any:
    vanish()
    return await async_save(self, *args, **kwargs)

  def vanish_and_finalize(self: Any, *args: Any, **kwargs: Any) -> None:
    vanish()
    finalize(self, *args, **kwargs)

  with Checkpoints(run, keep_last=2) as checkpoints:
    _save(checkpoints, 3, make_state(3))
  if moment == "write":
    monkeypatch.setattr(handler, "async_save", vanish_and_save)
  elif moment == "finalize":
    monkeypatch.setattr(handler, "finalize", vanish_and_finalize)
  resumes = "resumes from step 6" if how == "rename" else "starts from step 0"
  with Checkpoints(run, keep_last=2) as checkpoints:
    if moment == "before":
      vanish()
    with pytest.raises(
      UserError,
      match=rf"step 6 could not be saved: the folder {run}/checkpoints was"
      rf" renamed or removed .*; restore it, .*: it {resumes}$",
    ):
      _save(checkpoints, 6, make_state(6))
  if how == "remove":
    assert not list(tmp_path.iterdir())
    return
  assert [x.name for x in tmp_path.iterdir()] == ["other"]
  # Only the digests are missing.
  assert sorted(x.name for x in (other / "checkpoints").iterdir()) == ["3", "6"]
  assert integrity.examine(other / "checkpoints" / "6") is None


def test_errors_name_the_folder_that_the_user_knows(tmp_path):
  folder = tmp_path / "checkpoints"
  held = HeldFolder(folder)
  assert held.in_place
  inside = f"{held.path}/6/params"
  cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), inside)
  error = ValueError(f"writing {inside}: No space left on device")
  error.__cause__ = cause
  held.name_files(error)
  assert str(error) == f"writing {folder}/6/params: No space left on device"
  assert cause.filename == f"{folder}/6/params"
  folder.rename(tmp_path / "other")
  assert not held.in_place
  folder.mkdir()
  assert not held.in_place
  held.close()
  held.close()


def test_an_error_is_reported_during_the_wait_for_other_hosts(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(checkpoints_lib, "_LAST_WORDS_SECONDS", 0.1)
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    done = threading.Event()

    def wait(step: int) -> None:
      done.wait(60)

    checkpoints._saved = 6
    checkpoints._completion = checkpoints_lib._Completion(6, wait)
    checkpoints._completion.start()
    checkpoints.check_errors()
    checkpoints._note_error(OSError(errno.EROFS, os.strerror(errno.EROFS)))
    with pytest.raises(UserError, match=r"step 6 .*Read-only file system"):
      checkpoints.check_errors()
    done.set()


def test_what_ended_a_run_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
  def end(first: Exception | None) -> None:
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
      checkpoints.save(1 if first else 2, make_state(1))
      if first is not None:
        raise first

  _fail_digests(monkeypatch, ValueError("odd"))
  with pytest.raises(KeyError, match="first"):
    end(KeyError("first"))
  with pytest.raises(RuntimeError, match=r"step 2 could not .*ValueError: odd"):
    end(None)


# A coroutine is dropped while Python runs, and another at exit.
_DROPPED = """
import sys, warnings
from narvl_jax.reliability.explain import quiet_failed_saves

async def write_fragment():
  pass

if sys.argv[1] == "quiet":
  quiet_failed_saves()
write_fragment()
left = write_fragment()
warnings.warn("other")
"""


@pytest.mark.parametrize("quiet", ["quiet", "loud"])
def test_a_failed_save_leaves_no_warnings(quiet):
  # Not `subprocess.run`, which the tests patch to fail on warnings.
  with subprocess.Popen(
    [sys.executable, "-c", _DROPPED, quiet], stderr=subprocess.PIPE, text=True
  ) as process:
    _, errors = process.communicate()
  assert process.returncode == 0
  assert errors.count("never awaited") == (0 if quiet == "quiet" else 2)
  assert "other" in errors


@pytest.mark.usefixtures("_quiet")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("files", [8, 15, 22, 30])
def test_nothing_of_a_failed_save_stays_on_a_full_disk(tmp_path, files):
  with disks.small_disk(tmp_path / "disk", 50_000, files=files) as disk:
    with (
      Checkpoints(disk, keep_last=2) as checkpoints,
      pytest.raises(
        UserError, match=r"step 3 could not .* hold no more files .* inode"
      ),
    ):
      _save(checkpoints, 3, make_state(3))
    # Threads of the save create nothing again.
    time.sleep(0.5)
    assert disks.files(disk) == set()
    assert [x.name for x in (disk / "checkpoints").iterdir()] == []
