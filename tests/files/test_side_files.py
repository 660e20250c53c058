"""Damaged side files are set aside; no run fails because of them."""

import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from narvl_jax.data.sources.rows.files import RowFile
from narvl_jax.data.sources.tfds import index as tfds_index
from narvl_jax.files import side_files
from narvl_jax.reliability import session as hosts
from narvl_jax.run_folder import restarts as failures
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.run_folder.lock import RunLock
from narvl_jax.run_folder.metrics import MetricsWriter

_MINUTE = "2026-11-30T12:0{}:00.000+00:00"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  """Skips fsync: these tests write thousands of files."""
  monkeypatch.setattr(os, "fsync", lambda number: None)
  monkeypatch.setattr(workdir_lib, "environment", lambda: {"command": []})


def _start_metrics(run: pathlib.Path) -> None:
  with MetricsWriter(run, 4) as writer:
    writer.write(5, {"loss": 1.0})
  *_, last = (run / "metrics.jsonl").read_text().splitlines()
  values = json.loads(last)
  assert values.pop("time") > 0
  assert values == {"step": 5, "loss": 1.0}


def _start_restarts(run: pathlib.Path) -> None:
  failures.record_end(
    run, "stopped", code=0, stage=None, step=5, since=_MINUTE.format(5)
  )
  reported = failures.record_restart(run, step=5, saved=1.7e9)
  for record in reported:
    failures.describe(record)
  assert reported[-1]["how"] == "stopped"
  assert failures.summary(run)


def _start_lock(run: pathlib.Path) -> None:
  lock = RunLock(run, stale_seconds=0.001)
  lock.acquire(lambda line: None, lambda x: failures.record_death(run, x))
  lock.renew("step", 7)
  assert json.loads((run / "lock.json").read_text())["step"] == 7
  lock.release()
  assert not os.path.lexists(run / "lock.json")


def _start_environment(run: pathlib.Path) -> None:
  workdir_lib.write_environment(run, 5)
  assert json.loads((run / "environment.json").read_text())["step"] == 5


def _start_sharding(run: pathlib.Path) -> None:
  workdir_lib.write_sharding(run, "table")
  assert (run / "sharding.txt").read_text() == "table\n"


def _start_logs(run: pathlib.Path) -> None:
  with hosts._open_log(0, run / "logs"):
    pass
  assert (run / "logs" / "host_000.log").read_text().startswith("--- ")


def _start_rows(run: pathlib.Path) -> None:
  if not (run / "a.tsv").exists():
    (run / "a.tsv").write_bytes(b"x\ny\n")
  assert list(RowFile(run / "a.tsv", str(run / "index"))) == [b"x", b"y"]


def _start_tfds(run: pathlib.Path) -> None:
  ends = tfds_index.record_ends("key", 3, str(run / "index"), lambda i: 2)
  np.testing.assert_array_equal(ends, [2, 4, 6])


_STARTS: dict[str, Callable[[pathlib.Path], None]] = {
  "metrics.jsonl": _start_metrics,
  "restarts.jsonl": _start_restarts,
  "lock.json": _start_lock,
  "environment.json": _start_environment,
  "sharding.txt": _start_sharding,
  "logs": _start_logs,
  "logs/host_000.log": _start_logs,
  "tensorboard": _start_metrics,
}


def _write(run: pathlib.Path) -> None:
  """Writes the side files of a run that was killed."""
  with MetricsWriter(run) as writer:
    for step in (2, 4, 6):
      writer.write(step, {"loss": 0.5 * step, "accuracy": float("nan")})
  for _ in range(2):
    failures.record_end(
      run,
      "stopped",
      code=0,
      stage="step",
      step=4,
      since=_MINUTE.format(1),
      moment=_MINUTE.format(2),
    )
    failures.record_restart(run, step=4, saved=None, damaged=["step 6: lost"])
  workdir_lib.write_environment(run, 0)
  workdir_lib.write_environment(run, 4)
  lock = RunLock(run)
  # Written by a process that has ended.
  lock._contents["process_start"] = "1"
  lock.acquire(lambda line: None)


def _damages(data: bytes) -> Iterator[bytes]:
  """Yields a file with one flipped bit, cut short, or replaced."""
  end = len(data.rstrip())
  for bit in range(0, 8 * end, 5):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    yield bytes(flipped)
  for length in range(0, end, 9):
    yield data[:length]
  lines = data.splitlines(keepends=True)
  for line in (
    *(b"5", b"{}", b"[]", b"null", b'"x"', b"\xff\xfe", b"\0\0", b"{" * 99),
    *(b"[" * 100_000, b'{"step": [1]}', b'{"event": ["end"]}'),
    *(b'{"event": "end"}', b'{"event": "restart", "how": "x"}', b"1e999"),
  ):
    yield line + b"\n" + data
    yield b"".join([*lines[:1], line + b"\n", *lines[1:]])
    yield data + line


@pytest.mark.parametrize(
  "name",
  ["metrics.jsonl", "restarts.jsonl", "lock.json", "environment.json"],
)
def test_damage_never_keeps_a_run_from_starting(tmp_path, name, caplog):
  caplog.set_level(logging.ERROR, logger="absl")
  _write(tmp_path)
  path = tmp_path / name
  whole = path.read_bytes()
  for data in _damages(whole):
    path.write_bytes(data)
    for other in tmp_path.glob("*.damaged*"):
      other.unlink()
    _STARTS[name](tmp_path)


@pytest.mark.parametrize("kind", ["other", "nowhere", "loop", "pipe"])
@pytest.mark.parametrize("name", [*_STARTS])
def test_something_else_in_the_place_of_a_file(tmp_path, name, kind, caplog):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  if kind == "other" and name in ("logs", "tensorboard"):
    path.write_text("")
  elif kind == "other":
    (path / "below").mkdir(parents=True)
  elif kind == "nowhere":
    path.symlink_to(tmp_path / "absent" / "file")
  elif kind == "loop":
    path.symlink_to(path.name)
  else:
    os.mkfifo(path)
  _STARTS[name](tmp_path)
  aside = path.with_name(path.name + ".damaged")
  assert os.path.lexists(aside)
  reported = [
    r.getMessage() for r in caplog.records if path.name in r.getMessage()
  ]
  assert len(reported) == 1
  assert reported[0].endswith(f"set aside as {aside.name}")


@pytest.mark.parametrize("start", [_start_rows, _start_tfds])
def test_indexes(tmp_path, start):
  start(tmp_path)
  (path,) = (tmp_path / "index").iterdir()
  whole = path.read_bytes()
  for data in _damages(whole):
    path.write_bytes(data)
    start(tmp_path)
  # An archive of NumPy, which raises its own errors.
  for data in (b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff\xff{" + b"(" * 9999):
    path.write_bytes(data)
    start(tmp_path)
  for make in (os.mkdir, os.mkfifo, lambda x: os.symlink(tmp_path / "no", x)):
    path.unlink()
    make(path)
    start(tmp_path)
    assert path.read_bytes() == whole


def test_damaged_lines_are_kept_elsewhere(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(
    b'{"step": 2, "loss": 1.0}\n5\n{"step": 4}\n\xff\n{"step": 8, "lo'
  )
  with MetricsWriter(tmp_path, 4):
    pass
  assert path.read_bytes() == b'{"step": 2, "loss": 1.0}\n{"step": 4}\n'
  aside = tmp_path / "metrics.jsonl.damaged"
  assert aside.read_bytes() == b'5\n\xff\n{"step": 8, "lo\n'
  assert caplog.messages == [
    f"{path} has 3 damaged lines; set aside in metrics.jsonl.damaged"
  ]
  # Later damage is appended.
  with path.open("ab") as file:
    file.write(b"x\n")
  side_files.repair_lines(path, lambda line: True)
  assert aside.read_bytes() == b'5\n\xff\n{"step": 8, "lo\nx\n'


def test_damaged_lines_are_written_before_they_are_removed(
  tmp_path, monkeypatch
):
  path = tmp_path / "restarts.jsonl"
  path.write_bytes(b"5\n")

  def fail(*_: Any) -> None:
    raise OSError("killed")

  monkeypatch.setattr(side_files, "atomically", fail)
  with pytest.raises(OSError, match="killed"):
    side_files.repair_lines(path, lambda line: True)
  assert path.read_bytes() == b"5\n"
  assert (tmp_path / "restarts.jsonl.damaged").read_bytes() == b"5\n"


def test_readers_change_nothing(tmp_path):
  path = tmp_path / "restarts.jsonl"
  path.write_bytes(
    b'5\n{"event": "end", "how": "stopped"}\n{"event": "restart"}\n{"ev'
  )
  assert failures.history(tmp_path) == [{"event": "end", "how": "stopped"}]
  assert failures.summary(tmp_path) == []
  assert os.listdir(tmp_path) == [path.name]


def test_a_lock_that_is_damaged_while_it_is_held(tmp_path):
  lock = RunLock(tmp_path)
  lock.acquire(print)
  path = tmp_path / "lock.json"
  whole = path.read_bytes()
  place = whole.index(b'"id": "') + 7
  for data in (
    b"",
    b"\xff" * 1024,
    whole[:100],
    whole[:place] + b"z" + whole[place + 1 :],
    whole[:place] + (b"1" if whole[place] != 49 else b"2") + whole[place + 1 :],
  ):
    path.write_bytes(data)
    lock.renew("step", 3)
    assert json.loads(path.read_bytes())["step"] == 3
  lock.release()
