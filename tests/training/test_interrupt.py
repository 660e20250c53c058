"""Signals: the first one asks, the second one insists."""

import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from narvl_jax.parallel.notices import StopAgreement
from narvl_jax.training.interrupt import (
  StopRequest,
  Terminated,
  termination_raises,
)


def _send(number: int) -> None:
  os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_remembered_second_interrupts(number, capfd):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert stop.signal_number is None
    _send(number)
    assert stop.signal_number == number
    name = signal.Signals(number).name
    assert capfd.readouterr().err == (
      f"{name}: stopping after this step; once more to stop at once\n"
    )
    with pytest.raises(KeyboardInterrupt):
      _send(number)
  assert signal.getsignal(number) is before


def test_termination_raises_outside_of_the_steps():
  before = signal.getsignal(signal.SIGTERM)
  with termination_raises():
    with StopRequest() as stop:
      _send(signal.SIGTERM)
      assert stop.signal_number == signal.SIGTERM
    with pytest.raises(Terminated):
      _send(signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) is before


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


def test_a_signal_is_told_to_the_other_hosts(capfd):
  agreement = StopAgreement()
  notices: Any = SimpleNamespace(stop_signal=None, agreement=agreement)
  with StopRequest(notices) as stop:
    stop.begin(3)
    assert not stop.due(3)
    _send(signal.SIGTERM)
    assert notices.stop_signal == stop.signal_number == signal.SIGTERM
    # Not before all have agreed on the step.
    assert not stop.due(4)
    assert agreement.request() == 5
    agreement.agree(6)
    assert [stop.due(step) for step in (5, 6)] == [False, True]
  assert "stopping after this step" in capfd.readouterr().err


def test_another_host_was_told_to_stop():
  notices: Any = SimpleNamespace(stop_signal=None, agreement=StopAgreement())
  with StopRequest(notices) as stop:
    notices.stop_signal = signal.SIGINT
    assert stop.signal_number == signal.SIGINT
    # Its own first signal does not insist, and does not change the code.
    _send(signal.SIGTERM)
    assert stop.signal_number == signal.SIGINT
