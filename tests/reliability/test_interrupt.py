"""Signals: the first one asks, the second one insists."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from narvl_jax.hosts.agreement import StopAgreement
from narvl_jax.reliability.interrupt import (
  StopRequest,
  Terminated,
  ignore_signals,
  termination_raises,
)
from narvl_jax.run_folder import restarts as failures
from tests.conftest import ROOT

_ERRORS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def _send(number: int) -> None:
  os.kill(os.getpid(), number)


@_BOTH
def test_in_the_loop_the_first_signal_asks_and_the_second_insists(
  number, capfd
):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    stop.begin()
    assert not stop.due()
    _send(number)
    assert stop.signal_number == number
    assert stop.due()
    assert stop.stopped
    name = signal.Signals(number).name
    assert capfd.readouterr().err == (
      f"{name}: stopping after this step; once more to stop at once\n"
    )
    with pytest.raises(_ERRORS[number]) as error:
      _send(number)
  # Of Ctrl-C it is never said that anything was saved.
  assert getattr(error.value, "unsaved", True)
  assert signal.getsignal(number) is before


@_BOTH
def test_outside_of_the_loop_the_first_signal_insists(number):
  for around in (lambda stop: None, _whole_loop):
    with StopRequest() as stop:
      around(stop)
      with pytest.raises(_ERRORS[number]) as error:
        _send(number)
      assert not getattr(error.value, "unsaved", False)
      assert not stop.stopped


def _whole_loop(stop: StopRequest) -> None:
  stop.begin()
  assert not stop.due()
  stop.finish()


def test_a_signal_in_the_last_step_counts_after_the_loop():
  with StopRequest() as stop:
    stop.begin()
    _send(signal.SIGTERM)
    with pytest.raises(Terminated) as error:
      stop.finish()
  assert not error.value.unsaved


def test_a_signal_that_somebody_swallowed_counts_when_the_loop_begins():
  with StopRequest() as stop:
    with pytest.raises(Terminated):
      _send(signal.SIGTERM)
    with pytest.raises(Terminated):
      stop.begin()


# The main thread in C, where Python's handlers do not run, as in a compiler.
_STUCK = """
import ctypes, os, sys, threading
from narvl_jax.reliability.interrupt import StopRequest

def leave(error):
  print(type(error).__name__, getattr(error, "unsaved", None), flush=True)
  os._exit(7)

with StopRequest(patience=0.2) as stop:
  stop.leave = leave
  written = threading.Timer(float(sys.argv[2]), os.write, [1, b"written\\n"])
  written.daemon = True
  stop.busy = written.is_alive
  if sys.argv[1] == "loop":
    stop.begin()
  # In C until the process ends: `lock` waits for itself.
  mutex = ctypes.create_string_buffer(64)
  libc = ctypes.CDLL(None)
  libc.pthread_mutex_lock(mutex)
  if float(sys.argv[2]):
    written.start()
  # From another thread, once this one is there.
  threading.Timer(0.5, os.write, [1, b"ready\\n"]).start()
  libc.pthread_mutex_lock(mutex)
"""


def _stuck(where: str, busy: float = 0.0) -> subprocess.Popen:
  process = subprocess.Popen(
    [sys.executable, "-c", _STUCK, where, str(busy)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "ready\n"
  return process


def test_the_main_thread_is_in_c():
  process = _stuck("outside")
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=300) == ("Terminated False\n", "")
  assert process.returncode == 7


def test_a_write_in_progress_is_not_interrupted():
  process = _stuck("outside", busy=2.0)
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=300)
  assert out == "written\nKeyboardInterrupt None\n"


def test_the_main_thread_is_in_c_within_the_loop():
  process = _stuck("loop", busy=1000.0)
  assert process.stderr is not None
  process.send_signal(signal.SIGTERM)
  assert process.stderr.readline() == (
    "SIGTERM: stopping after this step; once more to stop at once\n"
  )
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=300)
  assert out == "Terminated True\n"


def test_signals_are_heard_without_a_terminal():
  process = _stuck("loop", busy=1000.0)
  assert process.stderr is not None
  process.stderr.close()
  process.stderr = None
  process.send_signal(signal.SIGTERM)
  time.sleep(0.5)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=300)
  assert out == "Terminated True\n"


def test_termination_raises():
  before = signal.getsignal(signal.SIGTERM)
  with termination_raises(), pytest.raises(Terminated):
    _send(signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) is before


def test_an_ending_process_ignores_signals():
  ignore_signals()
  assert _handlers() == [signal.SIG_IGN] * 2


def test_a_test_leaves_the_signals_as_they_were():
  # The one before ignored them, and so would all programs started here.
  assert _handlers() == _AT_FIRST


def _handlers() -> list[Any]:
  return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


# Shells have their background jobs ignore Ctrl-C.
_AT_FIRST = _handlers()


def test_other_threads_leave_signals_alone():
  errors = []

  def work() -> None:
    try:
      with StopRequest() as stop:
        assert stop.signal_number is None
    except Exception as error:
      errors.append(error)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert not errors


def test_a_signal_is_sent_to_the_other_hosts(capfd):
  agreement = StopAgreement()
  notices: Any = SimpleNamespace(stop_signal=None, agreement=agreement)
  with StopRequest(notices) as stop:
    stop.begin()
    assert not stop.due()
    _send(signal.SIGTERM)
    assert notices.stop_signal == stop.signal_number == signal.SIGTERM
    # Not before all have agreed.
    assert not stop.due()
    assert agreement.request() == 3
    agreement.agree(4)
    assert [stop.due(), stop.due()] == [False, True]
  assert "stopping after this step" in capfd.readouterr().err


def test_another_host_received_a_stop_request():
  notices: Any = SimpleNamespace(stop_signal=None, agreement=StopAgreement())
  with StopRequest(notices) as stop:
    stop.begin()
    notices.stop_signal = signal.SIGINT
    assert stop.signal_number == signal.SIGINT
    # Its own first signal does not insist, and does not change the other's.
    _send(signal.SIGTERM)
    assert stop.signal_number == signal.SIGINT


def _stop_twice(folder: pathlib.Path, *more: str) -> subprocess.Popen[str]:
  process = subprocess.Popen(
    [sys.executable, "-m", "tests.training.stopped_twice", folder, *more],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "ready\n"
  return process


def _check_end(process: subprocess.Popen[str], folder: pathlib.Path) -> None:
  _, errors = process.communicate(timeout=300)
  # It was a segmentation fault when the interpreter ended.
  assert process.returncode == 0, errors
  (line,) = errors.splitlines()
  assert line.startswith("SIGTERM: stopped; run the same command again to res")
  assert not (folder / "lock.json").exists()
  (event,) = failures.history(folder)
  assert event["how"] == "SIGTERM: stopped"


@pytest.mark.parametrize("gap", [0.02, 1.0])
def test_two_signals_while_it_compiles(tmp_path, gap):
  process = _stop_twice(tmp_path)
  # Somewhere in the compiler.
  time.sleep(1.0)
  for _ in range(2):
    process.send_signal(signal.SIGTERM)
    time.sleep(gap)
  _check_end(process, tmp_path)


def test_a_second_signal_does_not_cut_off_the_end(tmp_path):
  _check_end(_stop_twice(tmp_path, "while_it_ends"), tmp_path)
