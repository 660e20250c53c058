"""The state of a run as `status` shows it, from files of every kind."""

import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from narvl_jax.files.stores import as_path
from narvl_jax.run_folder.overview import Overview, overview

_NOW = datetime.datetime(2026, 1, 2, 12, 0, 0, tzinfo=datetime.UTC)
_CONFIG = {"train": {"steps": 100, "batch_size": 8}}
_METRICS = [
  {
    **{"step": 20, "train/loss": 3.0, "train/examples_per_second": 8.0},
    **{"train/seconds_left": 90.0},
    **{"validation/vqa/accuracy": 0.25, "data/vqa/examples": 160.0},
  },
  {
    **{"step": 40, "train/loss": 2.5, "train/examples_per_second": 16.0},
    **{"train/seconds_left": 30.0, "goodput/useful": 0.5},
  },
]
_RESTARTS = [
  {
    "event": "end",
    "how": "failed: MemoryError",
    "time": "2026-01-02T10:00:00Z",
  },
  {
    **{"event": "restart", "how": "failed: MemoryError", "from_step": 20},
    **{"time": "2026-01-02T10:05:00Z", "lost_seconds": 1.0, "damaged": []},
    "down_seconds": 300.0,
  },
]
_FILES = (
  *("config.json", "metrics.jsonl", "restarts.jsonl", "time.jsonl"),
  *("lock.json", "logs/host_001.log"),
)


def _at(seconds: float) -> str:
  return (_NOW + datetime.timedelta(seconds=seconds)).isoformat()


def _lock(age: float, **values: Any) -> str:
  held = {
    **{"host": "pod-0", "pid": 7, "machine": "of another", "id": "a" * 32},
    **{"since": _at(-500), "time": _at(-age), "phase": "step", "step": 60},
    **{"from_step": 20, "updates": 40},
    "seconds": {"init": 40.0, "step": 80.0},
  }
  return json.dumps(held | values).ljust(1023) + "\n"


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
  """A run that was restarted once, as a run on another machine leaves it."""
  _write(tmp_path)
  return tmp_path


def _write(folder: pathlib.Path) -> None:
  def lines(name: str, values: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(value) + "\n" for value in values)
    (folder / name).write_text(text)

  (folder / "logs").mkdir()
  (folder / "config.json").write_text(json.dumps(_CONFIG))
  lines("metrics.jsonl", _METRICS)
  lines("restarts.jsonl", _RESTARTS)
  process = {
    **{"time": _at(-420), "from_step": 0, "step": 40, "updates": 40},
    "seconds": {"init": 20.0, "step": 160.0},
  }
  lines("time.jsonl", [process])
  (folder / "lock.json").write_text(_lock(4.0))
  (folder / "logs" / "host_000.log").write_text(
    "--- first start\nerror: an old one\n--- second start\nfine\n"
  )
  (folder / "logs" / "host_001.log").write_text(
    "--- second start\nerror: --config.seed is wrong\nwatchdog: no progress\n"
    "more\n"
  )
  for name in ("20", "40", "40.orbax-checkpoint-tmp-1", "note"):
    record = folder / "checkpoints" / name / "record" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    os.utime(record, times=(0, _NOW.timestamp() - 33))


def _overview(folder: pathlib.Path) -> Overview:
  return overview(folder, clock=_NOW.timestamp, pause=_no_pause)


def _no_pause(seconds: float) -> None:
  raise AssertionError(f"waits for {seconds} s")


def test_a_live_run(run):
  expected: Any = pytest.approx
  assert _overview(run) == Overview(
    str(run),
    "alive",
    alive=True,
    host="pod-0, 7",
    phase="step",
    step=60,
    steps=100,
    loss=2.5,
    updates_per_second=2.0,
    # 30 s at step 40, of which a third is done.
    seconds_left=expected(20.0),
    # Half of 160 s and all of 80 s in 596 s: 20 + 160, 296 down, 120.
    goodput=expected(160.0 / 596.0),
    checkpoint={"step": 40, "age": expected(33.0)},
    evaluation={"step": 20, "metrics": {"validation/vqa/accuracy": 0.25}},
    restarts=1,
    errors={"host_001": "watchdog: no progress"},
  )


def test_a_run_that_gives_no_sign_of_life(run):
  (run / "lock.json").write_text(_lock(180.0))
  found = _overview(run)
  assert found.state == "no sign of life for 3m00s"
  assert not found.alive
  assert (found.phase, found.step) == ("step", 60)


@pytest.mark.parametrize("age", [30.0, -3600.0])
@pytest.mark.parametrize("moves", [True, False])
def test_the_lock_is_watched_where_clocks_may_differ(run, age, moves):
  (run / "lock.json").write_text(_lock(age))
  waited = []

  def pause(seconds: float) -> None:
    waited.append(seconds)
    if moves and len(waited) == 3:
      (run / "lock.json").write_text(_lock(age - 5))

  found = overview(run, clock=_NOW.timestamp, pause=pause)
  assert found.alive == moves
  assert sum(waited) == (3 if moves else 6)
  if not moves:
    shown = "30s" if age > 0 else "0s"
    assert found.state == f"no sign of life for {shown}"


def test_a_process_of_this_machine_is_looked_up(run, monkeypatch):
  from narvl_jax.files.processes import machine, process_start

  pid = os.getpid()
  near = {"machine": machine(), "pid": pid}
  text = _lock(999.0, **near, process_start=process_start(pid))
  (run / "lock.json").write_text(text)
  assert _overview(run).state == "alive"
  (run / "lock.json").write_text(_lock(1.0, **near, process_start="another"))
  assert _overview(run).state == "no sign of life for 1s"


def test_runs_that_have_ended(run):
  (run / "lock.json").unlink()
  assert _overview(run).state == "finished"
  assert _overview(run).seconds_left is None
  with (run / "restarts.jsonl").open("a") as file:
    file.write(json.dumps(_RESTARTS[0]) + "\n")
  found = _overview(run)
  assert found.state == "stopped: failed: MemoryError"
  assert (found.step, found.restarts, found.host) == (40, 1, None)
  for name in ("metrics.jsonl", "restarts.jsonl"):
    (run / name).unlink()
  assert _overview(run).state == "not started"
  (run / "config.json").unlink()
  assert _overview(run) == Overview(str(run), "no run")
  assert _overview(run / "absent").state == "no run"


@pytest.mark.parametrize("name", _FILES)
def test_damaged_and_half_written_files_cost_their_part_only(run, name):
  data = (run / name).read_bytes()
  deep = b"[" * 100_000
  pieces = [data[:size] for size in range(0, len(data), 37)]
  for damage in (*pieces, b"\xff\x00", b"[]", b"null", b'{"train": 3}', deep):
    (run / name).write_bytes(damage)
    found = overview(run, clock=_NOW.timestamp, pause=lambda seconds: None)
    assert found.state != "no run" or name == "lock.json"
    assert json.dumps(dataclasses.asdict(found))
    assert (found.checkpoint or {})["step"] == 40
  (run / name).unlink()
  (run / name).mkdir()
  found = overview(run, clock=_NOW.timestamp, pause=lambda seconds: None)
  assert (found.checkpoint or {})["step"] == 40


@pytest.mark.parametrize(
  "values",
  [
    {"step": -1, "train/loss": "low"},
    {"step": 3, "train/loss": None, "train/seconds_left": "long"},
    {"step": 3, "train/loss": 1.0, "train/examples_per_second": 0},
    {"step": 500, "train/loss": 1.0, "train/seconds_left": 3},
  ],
)
def test_odd_values(run, values):
  (run / "metrics.jsonl").write_text(json.dumps(values))
  found = _overview(run)
  assert found.alive
  assert found.loss in (1.0, None)


@pytest.mark.parametrize("store", ["gcs", "s3"])
def test_a_run_in_a_bucket_is_seen_as_a_local_one(run, store, request):
  folder: Any = as_path(f"{request.getfixturevalue(store).make_bucket()}/run")
  folder.put(run)
  # The checkpoint of step 40 is being written.
  (folder / "checkpoints" / "20" / "commit_success.txt").write_text("")
  found, local = _overview(folder), _overview(run)
  assert found.checkpoint is not None
  assert found.checkpoint["step"] == 20
  shown = {"folder": local.folder, "checkpoint": local.checkpoint}
  assert dataclasses.replace(found, **shown) == local


def test_jax_is_not_imported(run):
  code = (
    "import sys; from narvl_jax import status; "
    f"status.status([{str(run)!r}]); "
    "assert not {'jax', 'flax', 'orbax', 'numpy', 'fsspec'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
