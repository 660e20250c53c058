"""`metrics.jsonl`, TensorBoard and the averages of a progress line."""

import errno
import json
import math
import os
import pathlib
import struct
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from narvl_jax.run_folder import metrics
from narvl_jax.run_folder.metrics import MetricsWriter, format_bytes
from narvl_jax.terminal.activity import format_duration
from tests.conftest import ROOT


def _lines(workdir: pathlib.Path) -> list[dict]:
  text = (workdir / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  for line in lines:
    line.pop("time", None)
  return lines


def test_one_line_per_step(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {"loss": 2.0})
    writer.write(3, {"loss": 1.5})
    writer.write(3, {"accuracy": jnp.float32(0.5)})
    writer.write(4, {"loss": 1.0})
  assert _lines(tmp_path) == [
    {"step": 1, "loss": 2.0},
    {"step": 3, "loss": 1.5, "accuracy": 0.5},
    {"step": 4, "loss": 1.0},
  ]


def test_lines_have_the_time_of_their_first_value(tmp_path, monkeypatch):
  times = iter([10.0, 20.5, 30.0])
  monkeypatch.setattr(metrics.time, "time", lambda: next(times))
  with MetricsWriter(tmp_path, config={"tracking": {"trackers": ()}}) as writer:
    writer.write(1, {"loss": 2.0})
    writer.write(1, {"accuracy": 0.5})
  text = (tmp_path / "metrics.jsonl").read_text()
  assert text == '{"step": 1, "time": 10.0, "loss": 2.0, "accuracy": 0.5}\n'
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_flushed_line_includes_later_values(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(3, {"loss": 1.5})
    assert _lines(tmp_path) == []
    writer.flush()
    assert _lines(tmp_path) == [{"step": 3, "loss": 1.5}]
    writer.write(3, {"accuracy": 0.5})
    writer.flush()
    writer.flush()
    assert _lines(tmp_path) == [{"step": 3, "loss": 1.5, "accuracy": 0.5}]
    # Shorter than what it replaces.
    writer.write(3, {"loss": 7.0, "accuracy": 0.0625})
    writer.flush()
    writer.write(3, {"accuracy": 0.5})
  assert _lines(tmp_path) == [{"step": 3, "loss": 7.0, "accuracy": 0.5}]


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 1.0})

  def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")

  class Full:
    name = writer._file.name
    seek = write = truncate = flush = full

  with monkeypatch.context() as patch:
    patch.setattr(writer, "_file", Full())
    with pytest.raises(OSError, match="No space left") as error:
      writer.flush()
  assert error.value.filename == str(tmp_path / "metrics.jsonl")
  writer.close()


def test_going_back(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in (2, 4, 6):
      writer.write(step, {"loss": float(step)})
    writer.go_back(4)
    # What is written for the step itself still ends up in its line.
    writer.write(4, {"accuracy": 0.5})
    writer.write(6, {"loss": 60.0})
  assert _lines(tmp_path) == [
    {"step": 2, "loss": 2.0},
    {"step": 4, "loss": 4.0, "accuracy": 0.5},
    {"step": 6, "loss": 60.0},
  ]


def test_lines_after_the_resumed_step_are_removed(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in (2, 4, 6):
      writer.write(step, {"loss": float(step)})
  # Cut short, as by a full disk.
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 8, "lo')
  with MetricsWriter(tmp_path, resumed_step=4) as writer:
    writer.write(6, {"loss": 60.0})
  assert _lines(tmp_path) == [
    {"step": 2, "loss": 2.0},
    {"step": 4, "loss": 4.0},
    {"step": 6, "loss": 60.0},
  ]


def test_line_of_the_resumed_step_is_kept_and_extended(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(4, {"loss": 4.0})
  with MetricsWriter(tmp_path, resumed_step=4) as writer:
    writer.write(4, {"accuracy": 0.5})
  assert _lines(tmp_path) == [{"step": 4, "loss": 4.0, "accuracy": 0.5}]
  with MetricsWriter(tmp_path, resumed_step=4):
    pass
  assert _lines(tmp_path) == [{"step": 4, "loss": 4.0, "accuracy": 0.5}]


def test_a_killed_run_has_lost_no_line(tmp_path, monkeypatch):
  """A writer that is never flushed nor closed is one that was killed."""
  old = [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 4.0}]
  with MetricsWriter(tmp_path) as writer:
    for line in old:
      writer.write(line["step"], {"loss": line["loss"]})
  writer = MetricsWriter(tmp_path, resumed_step=4)
  assert _lines(tmp_path) == old
  writer.write(4, {"accuracy": 0.5})
  assert _lines(tmp_path) == old

  # Nor one that is killed while it adds to the line.
  def killed(path: pathlib.Path) -> None:
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(metrics, "atomically", killed)
    with pytest.raises(KeyboardInterrupt):
      writer.flush()
  assert _lines(tmp_path) == old
  writer.flush()
  new = [old[0], {"step": 4, "loss": 4.0, "accuracy": 0.5}]
  assert _lines(tmp_path) == new
  writer.write(6, {"loss": 6.0})
  writer.go_back(4)
  assert _lines(tmp_path) == new


def test_a_file_that_is_removed_meanwhile(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(4, {"loss": 4.0})
    writer.flush()
    (tmp_path / "metrics.jsonl").unlink()
    writer.write(4, {"accuracy": 0.5})
  assert _lines(tmp_path) == [{"step": 4, "loss": 4.0, "accuracy": 0.5}]


def test_values_that_are_not_finite_become_null(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1})
  assert _lines(tmp_path) == [
    {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}
  ]
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def _scalars(workdir: pathlib.Path) -> list[tuple[str, int, float]]:
  """Reads the event files: length, its checksum, event, its checksum."""
  found = []
  messages: Any = event_pb2
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = messages.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      found += [
        (value.tag, event.step, value.simple_value)
        for value in event.summary.value
      ]
  return found


def test_tensorboard_has_the_same_values(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(2, {"train/loss": 1.5, "train/nll": math.nan})
    writer.write(4, {"train/loss": 0.25})
  assert _scalars(tmp_path) == [("train/loss", 2, 1.5), ("train/loss", 4, 0.25)]


def test_torch_is_not_imported_for_it(tmp_path):
  """It takes seconds and memory of every run where it is installed."""
  (tmp_path / "torch.py").write_text("raise SystemExit('imported torch')\n")
  script = (
    "import pathlib, sys\n"
    "from narvl_jax.run_folder.tensorboard import Board\n"
    "board = Board(pathlib.Path('board'), 1)\n"
    "board.write(1, {'loss': 1.5})\n"
    "board.close()\n"
    "assert 'tensorboardX' in sys.modules and 'torch' not in sys.modules\n"
    "import torch\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  # Only that of the last line, which can have it.
  assert done.stderr.endswith("imported torch\n")
  assert "Traceback" not in done.stderr
  assert list((tmp_path / "board").iterdir())


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0, "0s"), (59.7, "1m00s"), (200, "3m20s"), (7500, "2h05m")],
)
def test_durations(seconds, text):
  assert format_duration(seconds) == text


@pytest.mark.parametrize(
  ("count", "text"),
  [(0, "0.0 B"), (999, "999.0 B"), (1500, "1.5 kB"), (2.5e15, "2500.0 TB")],
)
def test_sizes(count, text):
  assert format_bytes(count) == text
