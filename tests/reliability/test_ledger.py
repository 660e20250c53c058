"""The ledger of a run's time, on a clock that the tests turn."""

import re
import threading

import pytest

from narvl_jax.reliability.ledger import Ledger


class Clock:
  def __init__(self, now: float = 100.0) -> None:
    self.now = now

  def __call__(self) -> float:
    return self.now


def _shares(table: str) -> dict[str, float]:
  rows = re.findall(r"^ {2}(.+?) +([\d.]+) s +([\d.]+) %$", table, re.MULTILINE)
  assert len(rows) == len(table.splitlines())
  return {name: float(share) for name, _, share in rows}


def test_inner_stages_do_not_count_for_outer_ones():
  clock = Clock(100.0)
  ledger = Ledger(start=98.0, clock=clock)
  clock.now = 101.0
  with ledger.stage("step"):
    clock.now = 105.0
    with ledger.stage("checkpoint"):
      clock.now = 115.0
    with ledger.stage("step"):
      clock.now = 116.0
    clock.now = 118.0
  clock.now = 118.5
  assert ledger.elapsed() == 20.5
  assert ledger.seconds() == {
    "import": 2.0,
    "other": 1.5,
    "step": 7.0,
    "checkpoint": 10.0,
  }


def test_time_of_a_running_stage_counts():
  clock = Clock(0.0)
  ledger = Ledger(clock=clock)
  with ledger.stage("compile"):
    clock.now = 3.0
    assert ledger.seconds()["compile"] == 3.0
    clock.now = 5.0
    assert ledger.seconds()["compile"] == 5.0


def test_stage_ends_on_an_error():
  clock = Clock(0.0)
  ledger = Ledger(clock=clock)

  def fail() -> None:
    with ledger.stage("step"):
      clock.now = 1.0
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    fail()
  clock.now = 4.0
  assert ledger.seconds() == {"import": 0.0, "step": 1.0, "other": 3.0}


@pytest.mark.parametrize("stages", [3, 6, 7, 9, 11, 13])
def test_printed_shares_add_up_to_100(stages):
  clock = Clock(0.0)
  ledger = Ledger(clock=clock)
  # Equal parts: 3 x 33.3 % lack a tenth, 6 x 16.7 % have two too many.
  for i in range(stages):
    with ledger.stage(f"stage {i}"):
      clock.now += 1.0
  shares = _shares(ledger.table())
  assert shares.pop("total") == 100.0
  assert round(sum(shares.values()), 3) == 100.0
  assert all(abs(shares[f"stage {i}"] - 100 / stages) < 0.1 for i in range(3))


def test_table_ends_in_other_and_total():
  clock = Clock(0.0)
  ledger = Ledger(clock=clock)
  clock.now = 1.0
  with ledger.stage("step"):
    clock.now = 4.0
  assert ledger.table().splitlines() == [
    "  import  0.0 s    0.0 %",
    "  step    3.0 s   75.0 %",
    "  other   1.0 s   25.0 %",
    "  total   4.0 s  100.0 %",
  ]


def _updates(ledger: Ledger, clock: Clock, count: int, seconds: float) -> None:
  first = ledger.status.step
  for step in range(first + 1, first + count + 1):
    with ledger.stage("step"):
      ledger.progress(step)
      clock.now += seconds


def test_an_update_that_takes_far_longer_than_usual_is_a_stall():
  clock = Clock(0.0)
  ledger = Ledger(clock=clock)
  _updates(ledger, clock, 5, 1.0)
  _updates(ledger, clock, 1, 60.0)
  # Ten times the usual second; it counts while the update still lasts.
  seconds = {"import": 0.0, "other": 0.0, "step": 15.0, "stall": 50.0}
  assert ledger.seconds() == seconds
  _updates(ledger, clock, 3, 1.0)
  assert ledger.seconds()["step"] == 18.0
  assert ledger.seconds()["stall"] == 50.0


def test_short_updates_and_the_first_one_are_no_stalls():
  clock = Clock(0.0)
  ledger = Ledger(clock=clock)
  _updates(ledger, clock, 1, 400.0)
  _updates(ledger, clock, 9, 0.01)
  _updates(ledger, clock, 1, 4.0)
  with ledger.stage("evaluation"):
    clock.now += 100.0
  _updates(ledger, clock, 1, 0.01)
  assert "stall" not in ledger.seconds()


def test_account_counts_updates_that_a_rollback_repeats():
  clock = Clock(0.0)
  ledger = Ledger(clock=clock)
  ledger.resume(10)
  _updates(ledger, clock, 5, 1.0)
  ledger.progress()
  ledger._step = 12
  _updates(ledger, clock, 2, 1.0)
  assert ledger.account() == {
    "from_step": 10,
    "step": 14,
    "updates": 7,
    "seconds": {"import": 0.0, "other": 0.0, "step": 7.0},
  }


def test_seconds_may_be_read_by_another_thread():
  ledger = Ledger()
  stop = threading.Event()
  failures = []

  def read() -> None:
    while not stop.is_set():
      try:
        ledger.account()
      except RuntimeError as error:
        failures.append(error)

  reader = threading.Thread(target=read)
  reader.start()
  for step in range(500):
    with ledger.stage(f"stage {step % 7}"):
      ledger.progress(step)
  stop.set()
  reader.join()
  assert not failures
  assert sum(ledger.seconds().values()) == pytest.approx(
    ledger.elapsed(), abs=0.1
  )
