"""The failure ledger: what happened, what was lost, where it went on."""

import datetime
import json
import os
import pathlib
from typing import Any

import pytest

from narvl_jax.run_folder import restarts as failures
from narvl_jax.run_folder.lock import RunLock

_START = datetime.datetime(2026, 1, 2, 3, 0, 0, tzinfo=datetime.UTC)


def _at(seconds: float) -> str:
  return (_START + datetime.timedelta(seconds=seconds)).isoformat()


class _Now(datetime.datetime):
  """The clock of the next start, 1000 s after the run before it began."""

  @classmethod
  def now(cls, tz: Any = None) -> Any:
    return _START + datetime.timedelta(seconds=1000)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
  monkeypatch.setattr(failures.datetime, "datetime", _Now)


def _end(workdir: pathlib.Path, code: int = 1, step: int = 40) -> None:
  failures.record_end(
    workdir,
    "failed: MemoryError",
    code=code,
    stage="step",
    step=step,
    since=_at(0),
    moment=_at(700),
  )


def _epoch(seconds: float) -> float:
  return _START.timestamp() + seconds


def test_work_since_the_checkpoint_is_lost(tmp_path):
  _end(tmp_path)
  (record,) = failures.record_restart(tmp_path, step=30, saved=_epoch(450))
  assert record.pop("time")
  assert record == {
    "event": "restart",
    "how": "failed: MemoryError",
    "phase": "step",
    "step": 40,
    "lost_seconds": 250.0,
    "down_seconds": 300.0,
    "from_step": 30,
    "damaged": [],
  }
  assert failures.describe(record) == (
    'failed: MemoryError in phase "step" at step 40; 4m10s of work (10 steps)'
    " lost, down for 5m00s, resumed from step 30"
  )


@pytest.mark.parametrize(
  ("step", "saved", "lost"),
  # No checkpoint at all; one of an earlier start; one after its last sign.
  [(0, None, 700.0), (30, -50.0, 700.0), (30, 800.0, 0.0)],
)
def test_lost_work_counts_from_the_start_of_that_run(
  tmp_path, step, saved, lost
):
  _end(tmp_path)
  (record,) = failures.record_restart(
    tmp_path, step=step, saved=None if saved is None else _epoch(saved)
  )
  assert record["lost_seconds"] == lost


def test_starts_that_ended_before_they_went_on(tmp_path):
  _end(tmp_path)
  failures.record_end(
    tmp_path,
    "SIGTERM: stopped",
    code=0,
    stage="init",
    step=0,
    since=_at(800),
    moment=_at(820),
  )
  records = failures.record_restart(
    tmp_path, step=30, saved=_epoch(450), damaged=["step 40: one bit"]
  )
  assert [x["lost_seconds"] for x in records] == [250.0, 0.0]
  assert [x["down_seconds"] for x in records] == [100.0, 180.0]
  assert [x["damaged"] for x in records] == [[], ["step 40: one bit"]]
  assert failures.describe(records[1]).startswith(
    'SIGTERM: stopped in phase "init" at step 0; 0s of work lost, '
  )


@pytest.mark.parametrize(
  ("code", "step", "lost"),
  # Saved first; saved, but the checkpoint turned out to be damaged.
  [(0, 40, 0.0), (0, 30, 250.0), (1, 40, 250.0)],
)
def test_nothing_is_lost_after_a_stop_request(tmp_path, code, step, lost):
  _end(tmp_path, code)
  (record,) = failures.record_restart(tmp_path, step=step, saved=_epoch(450))
  assert record["lost_seconds"] == lost


def test_a_run_that_was_killed_is_known_from_its_lock(tmp_path):
  RunLock(tmp_path).acquire(print)
  held = json.loads((tmp_path / "lock.json").read_text())
  held |= {"phase": "checkpoint", "step": 12, "since": _at(0), "time": _at(90)}
  failures.record_death(tmp_path, held)
  (record,) = failures.record_restart(tmp_path, step=10, saved=_epoch(60))
  assert failures.describe(record) == (
    "ended unexpectedly: killed, or the machine lost in phase"
    ' "checkpoint" at step 12; 30s of work (2 steps) lost, down for 15m10s,'
    " resumed from step 10"
  )


def test_a_lock_without_contents(tmp_path):
  failures.record_death(tmp_path, {})
  (record,) = failures.record_restart(tmp_path, step=0, saved=None)
  assert record["lost_seconds"] == 0.0
  assert 'in phase "?" at step 0' in failures.describe(record)


def test_a_finished_run_has_no_restarts_to_report(tmp_path):
  assert failures.record_restart(tmp_path, step=50, saved=None) == []
  assert not list(tmp_path.iterdir())
  assert failures.summary(tmp_path) == []


def test_damaged_checkpoints_are_reported(tmp_path):
  (record,) = failures.record_restart(
    tmp_path, step=20, saved=None, damaged=["step 30: one bit"]
  )
  text = failures.describe(record)
  assert text.startswith("had finished; ")
  assert text.endswith("resumed from step 20; step 30: one bit")


def test_a_finished_run_loses_no_more_than_it_worked(tmp_path):
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_text("")
  os.utime(metrics, (_epoch(700), _epoch(700)))
  (record,) = failures.record_restart(
    tmp_path, step=20, saved=_epoch(650), damaged=["step 30: one bit"]
  )
  assert record["lost_seconds"] == 50.0
  assert record["down_seconds"] == 300.0


def test_the_end_of_a_run_is_counted_once(tmp_path):
  _end(tmp_path)
  assert failures.record_restart(tmp_path, step=30, saved=None)
  # This start was finished: it said nothing of its end.
  assert failures.record_restart(tmp_path, step=50, saved=None) == []


def test_the_summary_adds_up(tmp_path):
  for step, saved in ((30, 450), (40, 600)):
    _end(tmp_path)
    failures.record_restart(tmp_path, step=step, saved=_epoch(saved))
  lines = failures.summary(tmp_path)
  assert lines[0] == "restarts 2, 5m50s of work lost, down for 10m00s:"
  assert [line.split("resumed from ")[1] for line in lines[1:]] == [
    "step 30",
    "step 40",
  ]


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
  _end(tmp_path)
  path = tmp_path / failures.RESTARTS_FILE
  path.write_bytes(path.read_bytes() + b'{"event": "end", "ho')
  assert [x["event"] for x in failures.history(tmp_path)] == ["end"]
  failures.record_restart(tmp_path, step=30, saved=None)
  events = [x["event"] for x in failures.history(tmp_path)]
  assert events == ["end", "restart"]


def test_an_end_that_cannot_be_written_is_no_other_failure(tmp_path):
  _end(tmp_path / "absent")
  assert not list(tmp_path.iterdir())
