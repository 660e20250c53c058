"""Saves that fail, and what is left by processes that were killed."""

import dataclasses
import errno
import os
import resource
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.state.train_state import TrainState
from narvl_jax.training import checkpoints as checkpoints_lib
from narvl_jax.training.checkpoints import Checkpoints
from tests.training.saved import make_state, save_run


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


def test_a_failed_save_is_told_at_the_next_step(tmp_path, monkeypatch):
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
      # Only its digests are missing.
      r" again: it goes on from step 6",
    ):
      checkpoints.check_errors()
    # Told once.
    checkpoints.check_errors()


def test_a_file_that_cannot_grow_ends_the_save(tmp_path):
  # The limit of the process, like a disk that is full, is met in C++.
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


def test_an_error_is_told_while_other_hosts_are_waited_for(
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


# An array that nobody waits for, while Python runs and when it ends.
_DROPPED = """
import sys, warnings
from narvl_jax.training.announce import quiet_failed_saves

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
  errors = subprocess.run(
    [sys.executable, "-c", _DROPPED, quiet],
    capture_output=True,
    text=True,
    check=True,
  ).stderr
  assert errors.count("never awaited") == (0 if quiet == "quiet" else 2)
  assert "other" in errors
