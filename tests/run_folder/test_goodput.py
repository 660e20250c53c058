"""Useful and lost time of a run, from the records of its processes."""

import datetime
import json
import pathlib
from typing import Any

import pytest

from narvl_jax.run_folder import restarts, times
from narvl_jax.run_folder.goodput import CAUSES, goodput
from narvl_jax.run_folder.lock import RunLock

_START = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


def _process(
  end: float, first: int, last: int, updates: int | None = None, **spent: float
) -> dict[str, Any]:
  """Returns the record of a process; `end` is in seconds."""
  return {
    "time": (_START + datetime.timedelta(seconds=end)).isoformat(),
    "from_step": first,
    "step": last,
    "updates": last - first if updates is None else updates,
    "seconds": {name.replace("_", " "): value for name, value in spent.items()},
  }


def _lost(*processes: dict[str, Any]) -> dict[str, float]:
  lost = goodput(processes).lost
  assert set(lost) == set(CAUSES)
  return {name: seconds for name, seconds in lost.items() if seconds}


def test_stages_are_causes():
  stages = {"import": 1.0, "init": 2.0, "compile": 4.0, "data_wait": 8.0}
  more = {"evaluation": 16.0, "checkpoint": 32.0, "stall": 64.0, "trace": 0.5}
  process = _process(227.5, 0, 100, 100, step=100.0, **stages, **more)
  found = goodput([process])
  assert found.useful == 100.0
  assert found.wall == 227.5
  assert _lost(process) == {
    "start-up": 3.0,
    "compilation": 4.0,
    "data wait": 8.0,
    "evaluation": 16.0,
    "checkpoint": 32.0,
    "stalls": 64.0,
    "other": 0.5,
  }
  metrics = found.metrics()
  assert sum(metrics.values()) == pytest.approx(1.0)
  assert metrics["goodput/start_up"] == 3.0 / 227.5
  assert str(found) == (
    "goodput 44.0 % of 3m48s; lost: stalls 28.1 %, checkpoint 14.1 %,"
    " evaluation 7.0 %, data wait 3.5 %, compilation 1.8 %, start-up 1.3 %"
  )


def test_updates_after_the_checkpoint_and_the_time_between_are_lost():
  killed = _process(110.0, 0, 40, init=10.0, step=100.0)
  resumed = _process(200.0, 30, 60, init=20.0, step=60.0)
  found = goodput([killed, resumed])
  # 10 of 40 updates of 2.5 s; 10 s from the last sign of life to the start.
  assert _lost(killed, resumed) == {
    "start-up": 30.0,
    "lost work": 25.0,
    "between processes": 10.0,
  }
  assert found.useful == 135.0
  assert found.wall == 200.0


def test_work_may_be_lost_of_several_processes():
  processes = [
    _process(100.0, 0, 50, step=100.0),
    # Killed before its first save, so all of it is lost.
    _process(150.0, 40, 45, step=50.0),
    # Its checkpoints were damaged, so an earlier one was resumed.
    _process(180.0, 40, 55, step=30.0),
    _process(200.0, 20, 30, step=20.0),
  ]
  found = goodput(processes)
  assert found.lost["lost work"] == pytest.approx(60.0 + 50.0 + 30.0)
  assert found.useful == pytest.approx(60.0)


def test_updates_of_a_rollback_are_lost_once():
  found = goodput([_process(100.0, 0, 40, 50, step=100.0)])
  assert found.useful == pytest.approx(80.0)
  assert found.lost["lost work"] == pytest.approx(20.0)


def test_records_of_earlier_versions_count_as_kept():
  old = {"time": _START.isoformat(), "seconds": {"step": 60.0, "init": 40.0}}
  assert goodput([old]).share == 0.6
  assert goodput([]).share == 0.0
  assert str(goodput([])) == "goodput 0.0 % of 0s"


def test_a_process_that_was_recorded_twice_counts_once(tmp_path):
  path = tmp_path / times.TIMES_FILE
  first = _process(100.0, 0, 40, step=100.0)
  again = _process(100.1, 0, 40, step=100.0, other=0.1)
  after = _process(300.0, 40, 80, step=100.0)
  lines = [json.dumps(x) for x in (first, again, after)]
  path.write_text("\n".join(lines))
  assert times.history(tmp_path) == [again, after]


def test_a_killed_process_is_recorded_from_its_lock(tmp_path):
  account = {
    **{"from_step": 0, "step": 12, "updates": 12},
    "seconds": {"init": 3.5, "step": 6.0},
  }
  lock = RunLock(tmp_path)
  lock.acquire(print)
  lock.renew("step", 12, account)
  # Alive, or dead and not yet resumed.
  (process,) = times.processes(tmp_path)
  assert {x: process[x] for x in account} == account
  held = json.loads((tmp_path / "lock.json").read_text())
  assert len((tmp_path / "lock.json").read_bytes()) == 1024
  restarts.record_death(tmp_path, held)
  lock.release()
  assert times.processes(tmp_path) == [{"time": held["time"], **account}]


@pytest.mark.parametrize(
  "damage",
  [
    {"seconds": {"step": "much"}},
    {"seconds": {"step": -1.0}},
    {"seconds": [1.0]},
    {"step": None},
    {"updates": -3},
    {"time": "2026-01-02T00:00:00"},
    {"time": None},
  ],
)
def test_damaged_records_do_not_count(tmp_path: pathlib.Path, damage):
  process = _process(100.0, 0, 40, step=100.0)
  path = tmp_path / times.TIMES_FILE
  path.write_text(json.dumps(process | damage) + "\n" + json.dumps(process))
  assert times.history(tmp_path) == [process]
  (tmp_path / "lock.json").write_text(json.dumps(process | damage))
  assert len(times.processes(tmp_path)) <= 2
