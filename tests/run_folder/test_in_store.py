"""The files of a run in an object store."""

import json
import pathlib
import threading
import time

import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.files import spool as spool_lib
from narvl_jax.files.schemes import StoreError
from narvl_jax.files.spool import Spool
from narvl_jax.files.stores import as_path
from narvl_jax.reliability import watchdog
from narvl_jax.run import bad_numbers
from narvl_jax.run.bad_numbers import load_bundle
from narvl_jax.run_folder import restarts
from narvl_jax.run_folder.lock import LOCK_FILE, LockLost, RunLock
from narvl_jax.run_folder.metrics import METRICS_FILE, MetricsWriter
from tests.stores.servers import Store


@pytest.fixture(params=["gcs", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
  return request.getfixturevalue(request.param)


@pytest.fixture
def run(store: Store) -> pathlib.Path:
  return as_path(f"{store.make_bucket()}/run")


def _quiet(said: object) -> None:
  raise AssertionError(said)


def _read(run: pathlib.Path) -> dict[str, object]:
  return json.loads((run / LOCK_FILE).read_bytes())


def _foreign(run: pathlib.Path) -> None:
  """Leaves the lock of another machine."""
  RunLock(run).acquire(_quiet)
  held = _read(run) | {"machine": "b", "host": "b", "id": "other"}
  (run / LOCK_FILE).write_bytes(json.dumps(held).encode())


def test_one_of_many_runs_has_the_folder(run):
  _foreign(run)
  outcomes, dead = [], []
  start = threading.Barrier(4)

  def acquire() -> None:
    lock = RunLock(run, stale_seconds=0.5)
    start.wait()
    try:
      lock.acquire(lambda text: None, dead.append)
      outcomes.append("")
    except UserError as error:
      outcomes.append(str(error))

  threads = [threading.Thread(target=acquire) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert outcomes.count("") == 1
  assert all("is in use" in x for x in outcomes if x)
  assert len(dead) == 1
  assert [x.name for x in run.iterdir()] == [LOCK_FILE]


def test_a_lock_is_renewed_and_released(run):
  lock = RunLock(run)
  lock.acquire(_quiet)
  lock.renew("evaluation", 7)
  assert _read(run)["step"] == 7
  lock.release()
  assert not run.exists()


def test_a_lock_that_another_run_took_or_removed_is_lost(run):
  lock = RunLock(run)
  lock.acquire(_quiet)
  held = _read(run) | {"host": "b", "id": "other"}
  (run / LOCK_FILE).write_bytes(json.dumps(held).encode())
  with pytest.raises(LockLost, match=r"was taken over by the run of host b, "):
    lock.renew("step", 3)
  (run / LOCK_FILE).unlink()
  with pytest.raises(LockLost, match=r"lock.json no longer exists"):
    lock.renew("step", 3)
  (run / LOCK_FILE).write_bytes(json.dumps(held).encode())
  lock.release()
  assert _read(run) == held


def test_a_store_that_fails_for_a_moment_is_left_to_others(store, run):
  lock = RunLock(run)
  lock.acquire(_quiet)
  store.faults.fail(LOCK_FILE, 400, times=100)
  lock.renew("step", 3)
  store.faults.reset()
  lock.renew("step", 4)
  assert _read(run)["step"] == 4


def _steps(run: pathlib.Path) -> list[int]:
  text = (run / METRICS_FILE).read_text()
  return [json.loads(line)["step"] for line in text.splitlines()]


def test_metrics_are_stored_before_a_checkpoint_and_at_the_end(run):
  with MetricsWriter(run) as writer:
    for step in (1, 2, 3):
      writer.write(step, {"train/loss": 1.0})
    writer.sync()
    assert _steps(run) == [1, 2, 3]
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    writer.write(4, {"train/loss": 1.0})
  assert _steps(run) == [1, 2, 3, 4]
  # A resumed run continues the file, from the step of its checkpoint.
  with MetricsWriter(run, 2) as writer:
    writer.write(3, {"train/loss": 2.0})
    writer.go_back(1)
    writer.write(2, {"train/loss": 2.0})
  assert _steps(run) == [1, 2]
  assert list((run / "tensorboard").glob("events*"))


def test_files_that_grow_are_copied_now_and_then(run, monkeypatch):
  monkeypatch.setattr(spool_lib, "_SECONDS", 0.05)
  (run / "log").write_bytes(b"before\n")
  spool = Spool(run, ["log", "absent"])
  with (spool.folder / "log").open("ab") as file:
    file.write(b"after\n")
  deadline = time.monotonic() + 30
  while (run / "log").read_bytes() != b"before\nafter\n":
    assert time.monotonic() < deadline
    time.sleep(0.05)
  (spool.folder / "last").write_bytes(b"x")
  spool_lib.sync_all(30)
  assert (run / "last").read_bytes() == b"x"
  assert not spool.folder.exists()


def test_a_store_that_fails_is_reported_at_a_checkpoint(store, run):
  with MetricsWriter(run) as writer:
    writer.write(1, {"train/loss": 1.0})
    store.faults.fail(run.parent.name, 400, times=100)
    with pytest.raises(StoreError, match="the store failed"):
      writer.sync()
    store.faults.reset()
  assert _steps(run) == [1]


def test_bad_updates_are_stored(run):
  folder = run / "bad_numbers" / "step_0000001"
  arrays = {"labels": np.arange(4)}
  info = {"metrics": {"loss": "nan"}, "examples": [["vqa", 0]] * 4}
  bad_numbers._write(folder, info, arrays, range(4))
  bundle = load_bundle(folder)
  np.testing.assert_array_equal(bundle.batch["labels"], arrays["labels"])


def test_restarts_are_recorded(run):
  restarts.record_death(run, {"phase": "step", "step": 7})
  (record,) = restarts.record_restart(run, step=5, saved=None)
  assert record["from_step"] == 5
  assert [x["event"] for x in restarts.history(run)] == ["end", "restart"]


def test_stacks_are_written(run):
  place = watchdog.write_stacks(run, 0, "a reason")
  text = as_path(place).read_text()
  assert text.startswith("a reason\n")
  assert "test_stacks_are_written" in text
