"""Runs whose folder is in an object store: real processes."""

import json
import os
import pathlib
import re
import signal
import time
from typing import Any

import pytest

from narvl_jax.checkpointing import overview
from narvl_jax.checkpointing.record import is_stored, read_record, stored_steps
from narvl_jax.errors import UserError
from narvl_jax.files.store_path import StorePath
from narvl_jax.files.stores import as_path
from narvl_jax.run_folder import restarts
from narvl_jax.run_folder.lock import LOCK_FILE, RunLock
from tests.stores.servers import Store
from tests.support.processes import Process, start, start_together

STEPS, EVERY = 24, 4
# Name of an array's upload, with the step.
_ARRAYS = re.compile(r"checkpoints(?:/|%2F)(\d+)(?:/|%2F)params(?:/|%2F)ocdbt")


def _train(run: pathlib.Path, *more: str) -> list[str]:
  settings = {
    "train.eval_every": 0,
    "train.checkpoint_every": EVERY,
    "evaluation.max_examples": 4,
  }
  return [
    *("-m", "narvl_jax.train"),
    f"--config=tests/programs/tiny_run.py:{STEPS}",
    *(f"--config.{name}={value}" for name, value in settings.items()),
    *(f"--workdir={run}", *more),
  ]


def _losses(run: pathlib.Path) -> list[tuple[int, float]]:
  text = (run / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return [(line["step"], line["train/loss"]) for line in lines]


def _assert_same_end(a: pathlib.Path, b: pathlib.Path) -> None:
  """Checks that metrics and arrays (their checksums) are equal."""
  last = [read_record(x / "checkpoints" / str(STEPS)).leaves for x in (a, b)]
  assert last[0] == last[1]
  assert len(last[0]) > 4 * 40
  assert _losses(a) == _losses(b)
  assert len(_losses(a)) == STEPS


def _wait_for_save(process: Process, store: Store, number: int) -> None:
  """Returns while the process writes its checkpoint of that number."""
  store.faults.requests.clear()
  deadline = time.monotonic() + 400
  seen: set[str] = set()
  while len(seen) < number:
    assert process.running.poll() is None, process.output + process.errors
    assert time.monotonic() < deadline
    for request in list(store.faults.requests):
      if request.startswith("POST") and (found := _ARRAYS.search(request)):
        seen.add(found.group(1))
    time.sleep(0.005)


def _damage_newest(run: pathlib.Path) -> int:
  step = stored_steps(run / "checkpoints")[-1]
  files = StorePath(run / "checkpoints" / str(step)).files()
  largest = max(files, key=lambda x: x.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(bytes(data))
  return step


@pytest.mark.slow
def test_kills_preemption_and_damage(tmp_path, gcs):
  local, run = tmp_path / "local", as_path(f"{gcs.make_bucket()}/runs/tiny")
  whole = start(tmp_path, _train(local), devices=1, name="local")
  assert whole.wait() == 0, whole.errors
  # Otherwise a save takes no time.
  gcs.faults.latency = 0.05
  inside = 0
  folder = run / "checkpoints"
  for i in range(2):
    process = start(tmp_path, _train(run), devices=1, name=f"killed{i}")
    _wait_for_save(process, gcs, 2)
    process.running.kill()
    assert process.wait() == -signal.SIGKILL
    inside += any(not is_stored(x) for x in folder.glob("[0-9]*"))
  assert inside
  process = start(tmp_path, _train(run), devices=1, name="preempted")
  process.wait_for(r"step +\d+/24 ")
  with pytest.raises(UserError, match=f"--workdir={run} is in use: a run of"):
    RunLock(run).acquire(print)
  process.running.send_signal(signal.SIGTERM)
  assert process.wait() == 0, process.errors
  assert "SIGTERM: stopped at step" in process.output
  assert not (run / LOCK_FILE).exists()
  step = _damage_newest(run)
  gcs.faults.latency = 0.0
  process = start(tmp_path, _train(run), devices=1, name="last")
  assert process.wait() == 0, process.errors
  assert f"set aside: step {step}: file" in process.output
  _assert_same_end(local, run)
  assert "DAMAGED" not in overview.verify(run)
  ends = [x["how"] for x in restarts.history(run) if x["event"] == "restart"]
  assert len(ends) == 3
  assert ends[0].startswith("ended unexpectedly")
  assert ends[2] == "SIGTERM: stopped"
  # Nothing was written to a local folder of that name.
  assert not pathlib.Path("gs:").exists()


def _json(process: Process) -> dict[str, Any]:
  assert process.wait() == 0, process.errors
  return json.loads(process.output)


@pytest.mark.slow
def test_a_run_in_s3_and_its_readers(tmp_path, s3):
  run = as_path(f"{s3.make_bucket()}/runs/tiny")
  process = start(tmp_path, _train(run), devices=1, name="train")
  process.wait_for(r"step +\d+/24 ")
  process.running.kill()
  process.wait()
  process = start(tmp_path, _train(run), devices=1, name="resumed")
  assert process.wait() == 0, process.errors
  assert len(_losses(run)) == STEPS
  flags = (f"--workdir={run}", "--json")
  command = ["-m", "narvl_jax.evaluate", *flags, "--max_examples=4"]
  report = _json(start(tmp_path, command, devices=1, name="evaluate"))
  assert report["step"] == STEPS
  command = ["-m", "narvl_jax.predict", *flags, "--task=vqa", "--example=0"]
  answer = _json(start(tmp_path, command, devices=1, name="predict"))
  assert answer["prompt"]
  assert (run / "predictions" / "example_vqa_0.png").is_file()
  command = ["-m", "narvl_jax.report", str(run)]
  process = start(tmp_path, command, devices=1, name="report")
  assert process.wait() == 0, process.errors
  assert (run / "report.html").read_text().startswith("<!")


@pytest.mark.slow
def test_a_store_that_fails_during_a_run(tmp_path, gcs):
  """The run ends as on a full disk, and is resumed."""
  run = as_path(f"{gcs.make_bucket()}/runs/tiny")
  process = start(tmp_path, _train(run), devices=1, name="failing")
  deadline = time.monotonic() + 400
  while not (run / "checkpoints").is_dir():
    assert process.running.poll() is None, process.errors
    assert time.monotonic() < deadline
  gcs.faults.fail("checkpoints", 403, times=10**6)
  assert process.wait() == 2, process.output + process.errors
  assert "could not be saved" in process.errors
  assert len(process.errors.splitlines()) == 1
  gcs.faults.reset()
  process = start(tmp_path, _train(run), devices=1, name="resumed")
  assert process.wait() == 0, process.errors
  assert len(_losses(run)) == STEPS
  assert "DAMAGED" not in overview.verify(run)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, gcs):
  process = start(
    tmp_path, _train(as_path("gs://none-such/run")), devices=1, name="missing"
  )
  assert process.wait() == 2
  message = "error: --workdir=gs://none-such/run: there is no bucket none-such"
  assert process.errors.startswith(message), os.linesep + process.errors
  assert len(process.errors.splitlines()) == 1


@pytest.mark.slow
def test_two_hosts_share_a_folder(tmp_path, gcs):
  run = as_path(f"{gcs.make_bucket()}/runs/tiny")
  hosts = start_together(tmp_path / "a", _train(run), devices=1)
  hosts[0].wait_for(r"step +\d+/24 ")
  hosts[0].running.send_signal(signal.SIGTERM)
  assert [host.wait() for host in hosts] == [0, 0], hosts[0].errors
  hosts = start_together(tmp_path / "b", _train(run), devices=1)
  assert [host.wait() for host in hosts] == [0, 0], hosts[0].errors
  assert "resumed from the checkpoint of step" in hosts[0].output
  assert len(_losses(run)) == STEPS
  assert "DAMAGED" not in overview.verify(run)
  logs = [(run / "logs" / f"host_00{i}.log").read_text() for i in range(2)]
  # A line for each start.
  assert all(text.count("--- ") == 2 for text in logs)
