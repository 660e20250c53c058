"""The guard of a run: every end of a run is recorded."""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import sys
import threading
from typing import Any

import pytest

from narvl_jax.command_line.cli import Stopped
from narvl_jax.errors import UserError
from narvl_jax.reliability import guard as guard_lib
from narvl_jax.reliability import session
from narvl_jax.reliability.guard import Guard, check_unchanged
from narvl_jax.reliability.interrupt import Terminated
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.reliability.watchdog import HANG_CODE
from narvl_jax.run_folder import restarts as failures
from narvl_jax.run_folder import times
from narvl_jax.run_folder.lock import LOCK_FILE, LockLost
from narvl_jax.run_folder.workdir import CONFIG_FILE

_BUDGETS = {"step": 0.2, "other": 0.0}


def _end(workdir: pathlib.Path) -> dict[str, Any]:
  (end,) = failures.history(workdir)
  return end


def _guard(workdir: pathlib.Path, **settings: Any) -> Guard:
  return Guard(workdir, Ledger(), **settings)


@pytest.fixture
def fast(monkeypatch):
  monkeypatch.setattr(guard_lib.watchdog, "LOOK_SECONDS", 0.02)
  monkeypatch.setattr(guard_lib, "renew_seconds", lambda workdir: 0.0)


class Left:
  """Notes the exit code in the place of ending the process."""

  def __init__(self) -> None:
    self.codes: list[int] = []
    self.event = threading.Event()

  def __call__(self, code: int) -> None:
    self.codes.append(code)
    self.event.set()


def test_a_finished_run_leaves_nothing(tmp_path):
  with _guard(tmp_path) as guard:
    guard.lock_folder(print)
    assert (tmp_path / LOCK_FILE).exists()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("error", "code", "how"),
  [
    (UserError("the loss is nan; lower it"), 2, "error: the loss is nan"),
    (MemoryError("too\nmuch"), 1, "failed: MemoryError: too"),
    (KeyboardInterrupt(), 130, "SIGINT: stopped"),
  ],
)
def test_an_error_is_written_down_with_its_phase(tmp_path, error, code, how):
  guard = _guard(tmp_path)

  def fail() -> None:
    with guard:
      guard.lock_folder(print)
      guard.ledger.progress(12)
      with guard.ledger.stage("step"), guard.ledger.stage("data wait"):
        raise error

  with pytest.raises(type(error)):
    fail()
  end = _end(tmp_path)
  assert (end["how"], end["code"]) == (how, code)
  assert (end["phase"], end["step"]) == ("data wait", 12)
  assert not (tmp_path / LOCK_FILE).exists()


def test_a_run_without_the_lock_writes_nothing(tmp_path):
  def fail() -> None:
    with _guard(tmp_path / "run"):
      raise UserError("no such key")

  with pytest.raises(UserError):
    fail()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_a_run_with_a_stop_request(tmp_path, capsys, number, code):
  (tmp_path / CONFIG_FILE).touch()

  def stop() -> None:
    with _guard(tmp_path) as guard:
      guard.lock_folder(print)
      guard.stop.begin()
      os.kill(os.getpid(), number)
      guard.ledger.progress(7)
      assert guard.stop.due()
      guard.stopped(7)

  with pytest.raises(SystemExit) as exit_:
    stop()
  assert exit_.value.code == code
  name = signal.Signals(number).name
  assert capsys.readouterr().out == (
    f"{name}: stopped at step 7; run the same command again to resume:"
    f" {shlex.join(sys.orig_argv)}\n"
  )
  end = _end(tmp_path)
  assert (end["how"], end["code"], end["step"]) == (f"{name}: stopped", code, 7)
  assert not (tmp_path / LOCK_FILE).exists()
  assert (tmp_path / times.TIMES_FILE).read_text().count("\n") == 1


@pytest.mark.parametrize(
  ("text", "code"), [("75", 75), ("0", 0), ("", 0), ("much", 0)]
)
def test_a_launcher_chooses_the_code_of_a_stop(
  tmp_path, monkeypatch, text, code
):
  monkeypatch.setenv("NARVL_STOPPED_CODE", text)

  def stop() -> None:
    with _guard(tmp_path) as guard:
      guard.lock_folder(print)
      guard.stopped(7)

  with pytest.raises(SystemExit) as exit_:
    stop()
  assert exit_.value.code == code
  # The record is that of a success.
  assert _end(tmp_path)["code"] == 0
  error = Terminated()
  with pytest.raises(Stopped) as exit_:
    session.end(error, 0, "SIGTERM: stopped")
  assert exit_.value.code == code
  left = []
  monkeypatch.setattr(session.cli, "leave", left.append)
  for number in (0, 2):
    session.leave(number)
  assert left == [code, 2]


def test_an_end_is_written_once(tmp_path):
  with _guard(tmp_path) as guard:
    guard.lock_folder(print)
    guard.end(HANG_CODE, "host 1 (b): watchdog: no progress; see stacks")
    guard.end(1, "failed: something that this caused")
  assert _end(tmp_path)["how"] == "host 1 (b): watchdog: no progress"
  # This host shows where it stood, too.
  (stacks,) = (tmp_path / "stacks").iterdir()
  assert "test_an_end_is_written_once" in stacks.read_text()


def test_a_stop_waits_for_a_write_in_progress(tmp_path):
  with _guard(tmp_path) as guard:
    guard.lock_folder(print)
    answers = [True, True, False]
    guard.busy = lambda: answers.pop(0)
    guard.end(0, "host 1 (b): SIGTERM: stopped")
    assert not answers


@pytest.mark.usefixtures("fast")
def test_a_run_that_hangs_is_ended(tmp_path, capsys):
  left = Left()
  with _guard(tmp_path, leave=left) as guard:
    guard.lock_folder(print)
    guard.watch(_BUDGETS)
    with guard.ledger.stage("step"):
      assert left.event.wait(60)
  assert left.codes[0] == HANG_CODE
  (stacks,) = (tmp_path / "stacks").iterdir()
  line = capsys.readouterr().err.splitlines()[0]
  assert line.startswith("watchdog: no progress for ")
  assert f"stacks of all threads in {stacks}; run the same command" in line
  assert _end(tmp_path)["code"] == HANG_CODE


@pytest.mark.usefixtures("fast")
def test_a_run_whose_folder_was_taken_over_is_ended(tmp_path, capsys):
  left = Left()
  with _guard(tmp_path, leave=left) as guard:
    guard.lock_folder(print)
    guard.watch(_BUDGETS)
    held = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps(held | {"id": "other"}))
    assert left.event.wait(60)
  assert left.codes == [2]
  assert "was taken over by the run of host" in capsys.readouterr().err
  # The other one's files are left alone.
  assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_folder_that_vanished_is_noticed_before_it_is_written_to(tmp_path):
  run = tmp_path / "run"

  def look_twice() -> None:
    with _guard(run) as guard:
      guard.check_folder()
      guard.lock_folder(print)
      guard.check_folder()
      shutil.rmtree(run)
      with pytest.raises(
        LockLost, match=r"run or its lock.json no longer exists"
      ):
        guard.check_folder()
      guard.check_folder()

  with pytest.raises(LockLost, match=r"run or its lock.json no longer exists"):
    look_twice()
  # Not even how the run ended: it is no longer the folder of this run.
  assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("fast")
def test_a_lost_lock_is_reported_once(tmp_path, capsys):
  """By the thread or by who looks, who then goes no further."""
  passed = []
  leaving, left = threading.Event(), threading.Event()

  def leave(code: int) -> None:
    assert code == 2
    leaving.set()
    left.wait(60)

  with _guard(tmp_path, leave=leave) as guard:
    guard.lock_folder(print)
    guard.watch(_BUDGETS)
    (tmp_path / LOCK_FILE).unlink()
    assert leaving.wait(60)

    def look() -> None:
      with contextlib.suppress(LockLost):
        guard.check_folder()
        passed.append("as if nothing had happened")
      passed.append("after the process had ended")

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(0.2)
    assert not passed
    left.set()
    thread.join()
  assert passed == ["after the process had ended"]
  assert capsys.readouterr().err.count("lock.json") == 1


@pytest.mark.usefixtures("fast")
def test_signs_of_life_contain_phase_and_step(tmp_path):
  with _guard(tmp_path) as guard:
    guard.lock_folder(print)
    guard.watch(_BUDGETS | {"checkpoint": 0.0})
    guard.ledger.progress(3)
    with guard.ledger.stage("checkpoint"):
      for _ in range(2000):
        held = json.loads((tmp_path / LOCK_FILE).read_text())
        if (held["phase"], held["step"]) == ("checkpoint", 3):
          break
        threading.Event().wait(0.01)
      else:
        pytest.fail(f"no sign of life: {held}")


def test_a_run_that_began_meanwhile(tmp_path):
  check_unchanged(False, tmp_path)
  (tmp_path / CONFIG_FILE).write_text("{}")
  check_unchanged(True, tmp_path)
  with pytest.raises(
    UserError, match="another run began and ended in the meantime"
  ):
    check_unchanged(False, tmp_path)
