"""The loop with a step that costs nothing: what happens when."""

import json
import math
import pathlib
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.training import loop as loop_lib
from narvl_jax.training.interrupt import StopRequest
from narvl_jax.training.ledger import Ledger
from narvl_jax.training.loop import Loop
from narvl_jax.training.metrics import MetricsWriter
from tests.training.tiny import tiny_config


class FakeRun:
  """Everything around a loop; notes what the loop asks of it, in order."""

  def __init__(self, workdir: pathlib.Path, **train: Any) -> None:
    config = tiny_config()
    config.train.update(
      {"steps": 10, "log_every": 4, "eval_every": 0, "checkpoint_every": 0}
    )
    config.train.update(train)
    self.events: list[tuple] = []
    self.losses: dict[int, float] = {}
    self.norms: dict[int, float] = {}
    self.stop = StopRequest()
    self.stop_at: int | None = None
    self.progress = "none"
    self.ready = True
    self.ledger = Ledger()
    self.writer = MetricsWriter(workdir)
    device = SimpleNamespace(device_kind="NVIDIA H200")
    self.setup = SimpleNamespace(
      experiment=SimpleNamespace(config=config),
      mesh=SimpleNamespace(size=8, devices=np.array([device])),
      step_flops=lambda: 1e6,
    )

  def run(self, first: int = 0) -> Any:
    anything: Any = self
    setup: Any = self.setup
    loop = Loop(
      setup,
      self._step,
      anything,
      self._counters,
      self.writer,
      anything,
      self._evaluate,
      self.ledger,
      self.stop,
    )
    try:
      with self.stop:
        return loop.run(SimpleNamespace(step=first))  # pyright: ignore
    finally:
      self.writer.close()

  def _counters(self, step: int) -> dict[str, float]:
    return {"a/examples": 16 * step, "a/epochs": step / 4, "a/bad": step // 5}

  def _step(self, state: Any, batch: int) -> Any:
    assert batch == state.step
    step = state.step + 1
    if step == self.stop_at:
      signal.raise_signal(signal.SIGTERM)
    metrics = {
      "loss": np.float32(self.losses.get(step, step)),
      "grad_norm": np.float32(self.norms.get(step, 1.0)),
      "learning_rate": np.float32(0.5),
      "infeasible_fraction": np.float32(0.25),
      "examples": np.float32(8),
    }
    return SimpleNamespace(step=step), metrics

  def get(self) -> int:
    self._batches = getattr(self, "_batches", -1) + 1
    return self._batches

  def save(self, step: int, state: Any, *, score: float | None) -> None:
    assert state.step == step
    self.events.append(("save", step, score))
    self.progress = f"saved {step}"

  def _evaluate(self, state: Any, step: int) -> Any:
    assert state.step == step
    self.events.append(("evaluate", step))
    return {"validation/vqa/accuracy": step / 10}, step / 10


def _lines(workdir: pathlib.Path) -> list[dict]:
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_losses_are_averaged_between_reports(tmp_path):
  run = FakeRun(tmp_path)
  assert run.run().step == 10
  lines = _lines(tmp_path)
  assert [(x["step"], x["train/loss"]) for x in lines] == [
    (4, 2.5),
    (8, 6.5),
    (10, 9.5),
  ]
  # Only at the end, as nothing else was asked for.
  assert run.events == [("save", 10, None)]


def test_evaluations_and_checkpoints_when_due(tmp_path):
  run = FakeRun(tmp_path, eval_every=4, checkpoint_every=3)
  run.run()
  assert run.events == [
    ("save", 3, None),
    ("evaluate", 4),
    ("save", 4, 0.4),
    ("save", 6, None),
    ("evaluate", 8),
    ("save", 8, 0.8),
    ("save", 9, None),
    ("evaluate", 10),
    ("save", 10, 1.0),
  ]
  # One line a step, whoever wrote it.
  lines = {line["step"]: line for line in _lines(tmp_path)}
  assert list(lines) == [4, 8, 10]
  assert lines[8]["validation/vqa/accuracy"] == 0.8
  assert lines[8]["train/loss"] == 6.5


def test_resumed_run_keeps_the_steps(tmp_path):
  run = FakeRun(tmp_path, eval_every=4)
  run._batches = 6
  assert run.run(first=7).step == 10
  assert run.events[0] == ("evaluate", 8)
  assert [line["step"] for line in _lines(tmp_path)] == [8, 10]


def test_stop_saves_at_once_and_does_not_evaluate(tmp_path):
  run = FakeRun(tmp_path, eval_every=3, checkpoint_every=5)
  run.stop_at = 6
  assert run.run().step == 6
  assert run.events[-1] == ("save", 6, None)
  assert ("evaluate", 6) not in run.events
  # What was measured since the last report is not lost.
  assert _lines(tmp_path)[-1]["train/loss"] == 5.5


def test_stop_at_the_last_step_is_the_end(tmp_path):
  run = FakeRun(tmp_path, eval_every=3)
  run.stop_at = 10
  run.run()
  assert run.events[-2:] == [("evaluate", 10), ("save", 10, 1.0)]


@pytest.mark.parametrize(
  ("step", "words"),
  # At a report, between two, right before a checkpoint, at the very end.
  [(4, "loss is nan"), (6, "loss is nan"), (9, "loss is nan"), (10, "loss")],
)
def test_broken_state_is_not_saved(tmp_path, step, words):
  run = FakeRun(tmp_path, checkpoint_every=3)
  run.losses[step] = math.nan
  with pytest.raises(
    UserError,
    match=rf"the {words}.* at step {step}; lower --config.optimizer.learning_"
    r"rate or lengthen --config.optimizer.warmup_steps, in another --workdir",
  ):
    run.run()
  saved = [event[1] for event in run.events]
  assert saved == [s for s in (3, 6, 9) if s < step]
  assert _lines(tmp_path)[-1]["step"] == step
  assert _lines(tmp_path)[-1]["train/loss"] is None


def test_infinite_gradient_breaks_the_state_too(tmp_path):
  run = FakeRun(tmp_path)
  run.norms[5] = math.inf
  with pytest.raises(UserError, match=r"the gradient norm is inf at step 5;"):
    run.run()
  assert run.events == []


def test_metrics_are_on_disk_before_the_checkpoint(tmp_path):
  run = FakeRun(tmp_path, eval_every=4)
  seen = []

  def save(step: int, *_: Any, **__: Any) -> None:
    seen.append((step, _lines(tmp_path)[-1]))

  run.save = save
  run.run()
  assert [(step, line["step"]) for step, line in seen] == [
    (4, 4),
    (8, 8),
    (10, 10),
  ]
  assert seen[0][1]["validation/vqa/accuracy"] == 0.4


def test_progress_line(tmp_path, capsys):
  run = FakeRun(tmp_path, checkpoint_every=3)
  run.run()
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3
  for words in (
    "step      8/10  loss 6.5000  lr 5.00e-01  grad 1.00",
    " ex/s  ",
    " ex/s/device  ",
    "data wait ",
    "MFU ",
    "infeasible 25.0 %",
    "checkpoint saved 6",
    "ETA ",
  ):
    assert words in lines[1]
  assert "checkpoint none" not in lines[0]
  assert "bad records" not in lines[0]
  assert "bad records 1" in lines[1]
  assert "bad records 2" in lines[2]


def test_counters_of_the_sources_are_written(tmp_path):
  FakeRun(tmp_path).run()
  (line,) = [x for x in _lines(tmp_path) if x["step"] == 8]
  counters = {k: v for k, v in line.items() if k.startswith("data/")}
  assert counters == {
    "data/a/examples": 128,
    "data/a/epochs": 2.0,
    "data/a/bad": 1,
  }


def test_speed_follows_the_ledger(tmp_path, monkeypatch):
  now = [0.0]
  run = FakeRun(tmp_path, log_every=2)
  run.ledger = Ledger(clock=lambda: now[0])
  step, get = run._step, run.get

  def slow_step(state: Any, batch: int) -> Any:
    now[0] += 0.75
    return step(state, batch)

  def slow_get() -> int:
    now[0] += 0.25
    return get()

  monkeypatch.setattr(run, "_step", slow_step)
  monkeypatch.setattr(run, "get", slow_get)
  monkeypatch.setattr(loop_lib, "peak_flops", lambda _: 1e6)
  run.run()
  line = _lines(tmp_path)[2]
  # 8 examples in a second on 8 devices of 1 MFLOP/s.
  assert line["train/examples_per_second"] == pytest.approx(8)
  assert line["train/examples_per_second_per_device"] == pytest.approx(1)
  assert line["train/data_wait"] == pytest.approx(0.25)
  assert line["train/mfu"] == pytest.approx(1 / 8)
