"""Only one of several runs in a folder is alive."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from narvl_jax.errors import UserError
from narvl_jax.files.claims import LocalClaim
from narvl_jax.run_folder import lock as run_lock
from narvl_jax.run_folder.lock import LOCK_FILE, LockLost, RunLock

# A process that acquires the lock, reports it, and runs until it is killed.
_HOLD = """
import pathlib, sys, time
from narvl_jax.run_folder.lock import RunLock
RunLock(pathlib.Path(sys.argv[1])).acquire(print)
print("taken", flush=True)
time.sleep(600)
"""


def _read(workdir: pathlib.Path) -> dict[str, Any]:
  return json.loads((workdir / LOCK_FILE).read_text())


def _quiet(said: Any) -> None:
  raise AssertionError(said)


def _dead(lock: RunLock, say: Any = lambda text: None) -> list[dict[str, Any]]:
  """Acquires a lock; returns the locks of dead runs that it removed."""
  found: list[dict[str, Any]] = []
  lock.acquire(say, found.append)
  return found


@pytest.fixture
def holder(tmp_path: pathlib.Path) -> Iterator[subprocess.Popen]:
  """A process that contains the lock."""
  command = [sys.executable, "-c", _HOLD, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()


def _foreign(workdir: pathlib.Path) -> dict[str, Any]:
  """Leaves the lock of another machine."""
  RunLock(workdir).acquire(_quiet)
  held = _read(workdir) | {"machine": "b", "host": "b", "id": "other"}
  (workdir / LOCK_FILE).write_text(json.dumps(held))
  return held


def test_content_of_a_lock(tmp_path):
  lock = RunLock(tmp_path / "a" / "run")
  lock.acquire(_quiet, _quiet)
  (path,) = (tmp_path / "a" / "run").iterdir()
  held = _read(path.parent)
  assert held["pid"] == os.getpid()
  assert (held["phase"], held["step"]) == ("init", 0)
  assert held["since"] <= held["time"]
  size = path.stat().st_size
  lock.renew("evaluation", 12345)
  renewed = _read(path.parent)
  assert (renewed["phase"], renewed["step"]) == ("evaluation", 12345)
  assert renewed["time"] >= held["time"]
  assert renewed["since"] == held["since"] == lock.since
  # A full disk has room for it.
  assert path.stat().st_size == size
  lock.release()
  assert not list(path.parent.iterdir())
  lock.renew("step", 1)
  assert not list(path.parent.iterdir())


def test_a_run_of_this_machine_is_alive_and_then_killed(tmp_path, holder):
  process = holder
  held = _read(tmp_path)
  # It lives and is silent, as a run that hangs.
  lock = RunLock(tmp_path, stale_seconds=0.3)
  with pytest.raises(
    UserError,
    match=rf"--workdir={tmp_path} is in use: a run of host .*, process"
    rf" {process.pid}, since 20.* is alive \(last sign of life .* in phase"
    rf' "init" at step 0\); stop it \(kill {process.pid} on .*\), or use'
    r" another --workdir$",
  ):
    lock.acquire(lambda text: None)
  assert _read(tmp_path) == held
  process.kill()
  process.wait()
  said, dead = [], []
  lock.acquire(said.append, dead.append)
  assert dead == [held]
  assert f"takes over from the run of host {held['host']}" in said[-1]
  assert _read(tmp_path)["pid"] == os.getpid()
  assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_zombie_process_has_ended(tmp_path, holder):
  process = holder
  process.send_signal(signal.SIGKILL)
  assert process.stdout is not None
  assert process.stdout.read() == ""
  os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
  assert _dead(RunLock(tmp_path))
  process.wait()


def test_a_process_that_is_being_killed_is_waited_for(tmp_path, holder):
  process = holder
  # A large process takes a while to go.
  lock = RunLock(tmp_path, stale_seconds=60.0)
  held = _read(tmp_path)

  def kill(text: str) -> None:
    process.kill()
    process.wait()

  assert _dead(lock, kill) == [held]


def test_the_number_of_a_process_was_given_again(tmp_path):
  RunLock(tmp_path).acquire(_quiet)
  held = _read(tmp_path) | {"process_start": "1"}
  (tmp_path / LOCK_FILE).write_text(json.dumps(held))
  assert _dead(RunLock(tmp_path)) == [held]


def test_a_silent_run_of_another_machine_is_dead(tmp_path):
  held = _foreign(tmp_path)
  said = []
  assert _dead(RunLock(tmp_path, stale_seconds=0.2), said.append) == [held]
  assert "is that of a run of host b, process" in said[0]
  assert "waiting up to 0.2 s for a sign of life" in said[0]
  assert "takes over from the run of host b" in said[1]


def test_a_run_of_another_machine_gives_a_sign(tmp_path):
  held = _foreign(tmp_path)

  def renew(text: str) -> None:
    assert "waiting" in text
    sign = json.dumps({**held, "phase": "step", "step": 7})
    timer = threading.Timer(0.3, (tmp_path / LOCK_FILE).write_text, [sign])
    timer.start()

  with pytest.raises(UserError, match=r'host b, .*in phase "step" at step 7'):
    RunLock(tmp_path, stale_seconds=60.0).acquire(renew)


def test_a_run_that_is_waited_for_ends(tmp_path):
  _foreign(tmp_path)
  lock = RunLock(tmp_path, stale_seconds=60.0)
  assert _dead(lock, lambda _: (tmp_path / LOCK_FILE).unlink()) == []
  assert _read(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("text", [b"", b"\xff\x00", b'{"pid": 1', b"[1]"])
def test_an_unreadable_lock_belongs_to_no_live_run(tmp_path, text):
  (tmp_path / LOCK_FILE).write_bytes(text)
  assert _dead(RunLock(tmp_path, stale_seconds=0.1)) == [{}]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_at_once_one_has_it(tmp_path, monkeypatch, links):
  if not links:

    def link(*_: object) -> None:
      raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
  held = _foreign(tmp_path)
  outcomes, dead = [], []
  start = threading.Barrier(8)

  def run() -> None:
    lock = RunLock(tmp_path, stale_seconds=0.3)
    start.wait()
    try:
      lock.acquire(lambda text: None, dead.append)
      outcomes.append("")
    except UserError as error:
      outcomes.append(str(error))

  threads = [threading.Thread(target=run) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(outcomes) == 8
  assert outcomes.count("") == 1
  assert all("is in use" in x for x in outcomes if x)
  # One of them noticed it, for all.
  assert dead == [held]
  assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_of_many_that_found_the_same_dead_run_one_takes_over(
  tmp_path, monkeypatch
):
  _foreign(tmp_path)
  found = (tmp_path / LOCK_FILE).read_bytes()
  read = LocalClaim.read

  def slow(claim: LocalClaim) -> bytes | None:
    text = read(claim)
    # All have read before the first one writes, unless they wait.
    time.sleep(0.1)
    return text

  monkeypatch.setattr(LocalClaim, "read", slow)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    locks = [RunLock(tmp_path) for _ in range(4)]
    taken = [pool.submit(x._take_over, found, "init") for x in locks]
    assert sorted(x.result() for x in taken) == [False, False, False, True]


def test_the_lock_of_one_that_was_faster_stays(tmp_path):
  """Two found the same dead lock, and one of them has its own there now."""
  faster = RunLock(tmp_path)
  faster.acquire(_quiet)
  held = _read(tmp_path)
  slower = RunLock(tmp_path)
  assert not slower._take_over(b"the lock of a dead run", "init")
  assert _read(tmp_path) == held
  assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
  faster.renew("step", 1)


def test_a_lock_that_another_run_took_is_lost(tmp_path):
  lock = RunLock(tmp_path)
  lock.acquire(_quiet)
  held = _read(tmp_path) | {"machine": "b", "host": "b", "id": "other"}
  (tmp_path / LOCK_FILE).write_text(json.dumps(held))
  with pytest.raises(LockLost, match=r"was taken over by the run of host b, "):
    lock.renew("step", 3)
  lock.release()
  assert _read(tmp_path) == held


def test_a_folder_that_vanished(tmp_path):
  lock = RunLock(tmp_path / "run")
  lock.acquire(_quiet)
  shutil.rmtree(tmp_path / "run")
  with pytest.raises(
    LockLost, match=r"run or its lock.json no longer exists: nothing"
  ):
    lock.renew("step", 3)
  lock.release()


def test_a_disk_that_fails_for_a_moment_is_left_to_others(
  tmp_path, monkeypatch
):
  lock = RunLock(tmp_path)
  lock.acquire(_quiet)

  def fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "open", fail)
    lock.renew("step", 3)
  lock.renew("step", 4)
  assert _read(tmp_path)["step"] == 4


def test_without_proc_every_run_is_waited_for(tmp_path, monkeypatch):
  monkeypatch.setattr(run_lock, "machine", lambda: "")
  RunLock(tmp_path).acquire(_quiet)
  said = []
  RunLock(tmp_path, stale_seconds=0.1).acquire(said.append)
  assert "waiting up to 0.1 s" in said[0]


def test_far_too_long_values_are_not_quoted(tmp_path):
  held = {
    "host": "h" * 9000,
    "pid": 10**4000,
    "step": 10**4000,
    "since": "s",
    "time": "t",
    "phase": "p" * 400,
  }
  found = run_lock._parse(json.dumps(held).encode())
  assert found == {"since": "s", "time": "t"}
  assert len(run_lock._who(found) + run_lock._last_sign(found)) < 200


def test_a_huge_lock_is_not_read_whole(tmp_path):
  with (tmp_path / "lock.json").open("wb") as file:
    file.truncate(1 << 40)
  found = RunLock(tmp_path, stale_seconds=0.1)
  found.acquire(print)
  found.release()
  assert not list(tmp_path.iterdir())
