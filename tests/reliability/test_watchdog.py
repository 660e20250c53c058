"""A run without progress is noticed, by phase, and reported."""

import subprocess
import sys
import threading
from typing import Any

import pytest

from narvl_jax.experiment.config import default_config
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.reliability.watchdog import Hang, Watchdog, write_stacks

_BUDGETS = {"start": 30.0, "step": 10.0, "data_wait": 20.0, "other": 50.0}


class Clock:
  def __init__(self) -> None:
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


def _fail(hang: Hang) -> None:
  raise AssertionError(str(hang))


def _looking(ledger: Ledger, clock: Clock, **budgets: float) -> Any:
  """Returns a function: looks every two seconds for some; returns the hang."""
  dog = Watchdog(
    ledger, _BUDGETS | budgets, on_hang=_fail, look_seconds=2.0, clock=clock
  )

  def pass_seconds(seconds: int) -> Hang | None:
    found = None
    for _ in range(seconds // 2):
      clock.now += 2.0
      found = found or dog.look()
    return found

  return pass_seconds


@pytest.mark.parametrize(
  ("stage", "name", "budget"),
  [
    ("init", "start", 30),
    ("step", "step", 10),
    ("data wait", "data_wait", 20),
    ("something new", "other", 50),
  ],
)
def test_each_phase_has_its_budget(stage, name, budget):
  ledger, clock = Ledger(), Clock()
  looking = _looking(ledger, clock)
  ledger.progress(7)
  with ledger.stage(stage):
    # The first look finds what is new.
    assert looking(2 + budget) is None
    hang = looking(2)
    assert hang == Hang(stage, 7, budget + 2.0, name, budget)
  assert str(hang) == (
    f'no progress for {budget + 2} s in phase "{stage}" at step 7'
    f" (--config.watchdog.{name}={budget})"
  )


def test_every_move_counts():
  ledger, clock = Ledger(), Clock()
  looking = _looking(ledger, clock)
  with ledger.stage("step"):
    assert looking(10) is None
    ledger.progress(1)
    assert looking(10) is None
    # Batches of an evaluation have no number.
    ledger.progress()
    assert looking(10) is None
    with ledger.stage("data wait"):
      pass
    assert looking(10) is None
    assert looking(4) is not None


def test_a_phase_without_a_budget_may_last():
  ledger, clock = Ledger(), Clock()
  looking = _looking(ledger, clock, step=0.0)
  with ledger.stage("step"):
    assert looking(100_000) is None


def test_a_machine_that_was_paused_has_not_hung():
  ledger, clock = Ledger(), Clock()
  looking = _looking(ledger, clock)
  with ledger.stage("step"):
    looking(2)
    clock.now += 3600.0
    assert looking(2) is None
    assert looking(8) is not None


def test_every_stage_of_a_run_has_a_budget():
  budgets = default_config("vqa").watchdog
  dog = Watchdog(Ledger(), budgets, on_hang=_fail)
  stages = ("init", "compile", "step", "data wait", "evaluation", "checkpoint")
  names = [dog._budget(stage)[0] for stage in (*stages, "other")]
  assert sorted(names) == sorted(budgets)
  assert all(budget > 0 for budget in budgets.values())


def test_the_thread_checks_and_reports():
  ledger = Ledger()
  told = threading.Event()
  looks = []
  dog = Watchdog(
    ledger,
    _BUDGETS | {"step": 0.2},
    on_hang=lambda hang: (looks.append(hang), told.set()),
    on_look=lambda: looks.append(None),
    look_seconds=0.02,
  )
  with dog, ledger.stage("step"):
    assert told.wait(60)
  assert None in looks
  hang = next(x for x in looks if x is not None)
  assert (hang.stage, hang.name) == ("step", "step")
  assert not dog._thread.is_alive()


def test_stacks_of_all_threads(tmp_path):
  release = threading.Event()

  def wait_in_a_thread() -> None:
    release.wait()

  (tmp_path / "run").mkdir()
  thread = threading.Thread(target=wait_in_a_thread)
  thread.start()
  try:
    path = write_stacks(tmp_path / "run", 3, "watchdog: no progress")
  finally:
    release.set()
    thread.join()
  (found,) = (tmp_path / "run" / "stacks").iterdir()
  assert str(found) == path
  assert found.name.startswith("host_003_20")
  text = found.read_text()
  assert text.startswith("watchdog: no progress\nprocess ")
  assert "in wait_in_a_thread" in text
  assert "in test_stacks_of_all_threads" in text


def test_stacks_without_a_disk(tmp_path, capfd):
  (tmp_path / "run").write_text("")
  assert write_stacks(tmp_path / "run", 0, "why") == "stderr"
  assert "in test_stacks_without_a_disk" in capfd.readouterr().err


def test_stacks_do_not_recreate_a_removed_folder(tmp_path, capfd):
  assert write_stacks(tmp_path / "run", 0, "why") == "stderr"
  assert "in test_stacks_do_not_recreate" in capfd.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_thread_that_keeps_the_lock_of_python_is_ended():
  program = """
import ctypes
from narvl_jax.reliability import watchdog
from narvl_jax.reliability.ledger import Ledger
watchdog._GRACE_SECONDS = 1.0
budgets = dict.fromkeys(("start", "step", "other"), 0.1)
dog = watchdog.Watchdog(
  Ledger(), budgets, on_hang=lambda hang: None, look_seconds=0.05
)
def keep_the_lock():
  ctypes.PyDLL(None).sleep(600)
with dog:
  while dog._still == 0.0:
    pass
  keep_the_lock()
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 1
  assert "Timeout (" in done.stderr
  assert "in keep_the_lock" in done.stderr
