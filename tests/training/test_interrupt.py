"""Signals: the first one asks, the second one insists."""

import os
import signal
import threading

import pytest

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
