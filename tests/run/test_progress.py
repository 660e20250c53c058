"""The lines and the bar that a run prints, and the metrics it writes."""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.hosts.host_times import HostTimes
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run import progress as progress_lib
from narvl_jax.run.progress import mean_metrics
from narvl_jax.terminal.activity import Activity
from tests.run.fake_run import FakeRun, lines_of


def test_losses_are_averaged_between_reports(tmp_path):
  run = FakeRun(tmp_path)
  assert run.run().step == 10
  lines = lines_of(tmp_path)
  assert [(x["step"], x["train/loss"]) for x in lines] == [
    (4, 2.5),
    (8, 6.5),
    (10, 9.5),
  ]
  # Only at the end, as nothing else was asked for.
  assert run.events == [("save", 10, None)]


def test_progress_line(tmp_path, capsys):
  run = FakeRun(tmp_path, checkpoint_every=3)
  run.run()
  lines = capsys.readouterr().out.splitlines()
  saved = [line.split("] ")[1] for line in lines if "checkpoint" in line]
  assert saved == [f"checkpoint of step {step} saved" for step in (3, 6, 9)]
  lines = [line for line in lines if "checkpoint" not in line]
  assert len(lines) == 3
  for words in (
    "step  8/10  loss 6.500  lr 5.0e-1  ",
    " ex/s  ",
    "MFU 0%",
    "ETA 0s",
    "infeasible 25.0 %",
  ):
    assert words in lines[1]
  assert "device" not in lines[1]
  assert "bad records" not in lines[0]
  assert "bad records 1" in lines[1]
  assert "bad records 2" in lines[2]


def test_a_usual_line_fits_a_terminal(tmp_path, capsys):
  """The steps and the speed of a run of hours on an accelerator."""
  now = [4000.0]
  run = FakeRun(tmp_path, steps=9000, log_every=100)
  run.ledger = Ledger(start=0.0, clock=lambda: now[0])
  step = run.train_step

  def slow_step(state: Any, batch: int) -> Any:
    now[0] += 0.0065
    state, metrics = step(state, batch)
    return state, metrics | {"infeasible_fraction": np.float32(0)}

  run.train_step = slow_step
  run.batches.counters = lambda position: {}
  run.run()
  lines = capsys.readouterr().out.splitlines()
  assert lines[29].startswith("[ 4019.5s] step 3000/9000  loss 2950.  lr 5.0e")
  assert lines[29].endswith("  1231 ex/s  MFU 0%  ETA >39s")
  assert max(map(len, lines)) <= 80


def test_time_left_after_going_back_is_that_of_more_steps(tmp_path, capsys):
  now = [0.0]
  run = FakeRun(
    tmp_path, steps=100, log_every=20, checkpoint_every=20, policy="rollback"
  )
  run.ledger = Ledger(clock=lambda: now[0])
  run.losses[74] = math.nan
  step = run.train_step

  def slow_step(state: Any, batch: int) -> Any:
    now[0] += 60.0
    return step(state, batch)

  run.train_step = slow_step
  run.run()
  lines = [
    line.split()
    for line in capsys.readouterr().out.splitlines()
    if "ETA" in line
  ]
  left = [(x[x.index("step") + 1], x[x.index("ETA") + 1]) for x in lines]
  assert left == [
    ("20/100", ">1h20m"),
    ("40/100", "1h00m"),
    ("60/100", "40m00s"),
    # The updates after the save of step 60 are made once more.
    ("80/100", "20m00s"),
  ]
  assert now[0] > 100 * 60


def test_counters_of_the_sources_are_written(tmp_path):
  FakeRun(tmp_path).run()
  (line,) = [x for x in lines_of(tmp_path) if x["step"] == 8]
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
  step, get = run.train_step, run.batches.get

  def slow_step(state: Any, batch: int) -> Any:
    now[0] += 0.75
    return step(state, batch)

  def slow_get() -> int:
    now[0] += 0.25
    return get()

  monkeypatch.setattr(run, "train_step", slow_step)
  monkeypatch.setattr(run.batches, "get", slow_get)
  monkeypatch.setattr(progress_lib, "peak_flops", lambda _: 1e6)
  run.run()
  line = lines_of(tmp_path)[2]
  # 8 examples in a second on 8 devices of 1 MFLOP/s.
  assert line["train/examples_per_second"] == pytest.approx(8)
  assert line["train/examples_per_second_per_device"] == pytest.approx(1)
  assert line["train/data_wait"] == pytest.approx(0.25)
  assert line["train/mfu"] == pytest.approx(1 / 8)
  assert line["goodput/useful"] == 0.75
  assert line["goodput/other"] == 0.25


def test_the_bar_follows_the_run(tmp_path, monkeypatch):
  shown = []

  @contextlib.contextmanager
  def doing(*args: Any, **settings: Any) -> Iterator[Activity]:
    shown.append((args, settings, Activity(*args, done=settings["done"])))
    yield shown[-1][2]

  monkeypatch.setattr(progress_lib, "doing", doing)
  run = FakeRun(tmp_path, checkpoint_every=4)
  run.batches.position = 2
  run.run(2)
  ((args, settings, activity),) = shown
  assert args == ("training", 10, "steps")
  assert settings == {"done": 2, "only_live": True}
  assert activity.done == 10
  assert activity.progress().endswith(" left")


def _step(**values: float) -> dict:
  base = {"examples": 8.0, "learning_rate": 0.1, "skipped": 0.0}
  return {name: jnp.float32(x) for name, x in {**base, **values}.items()}


def test_means_over_steps():
  steps = [
    _step(loss=1.0, learning_rate=0.1, **{"nll/vqa": math.nan}),
    _step(loss=2.0, learning_rate=0.2, **{"nll/vqa": 4.0}),
    _step(loss=6.0, learning_rate=0.3, **{"nll/vqa": 6.0}),
  ]
  means = mean_metrics(steps)
  assert means == {
    "loss": 3.0,
    "learning_rate": pytest.approx(0.3),
    "nll/vqa": 5.0,
  }


def test_task_that_no_step_had_is_left_out():
  assert "nll/vqa" not in mean_metrics([_step(**{"nll/vqa": math.nan})])


def test_updates_that_were_left_out_do_not_count():
  bad = _step(loss=math.nan, skipped=1.0, learning_rate=0.2)
  means = mean_metrics([_step(loss=1.0), bad])
  assert means == {"loss": 1.0, "learning_rate": pytest.approx(0.2)}
  assert math.isnan(mean_metrics([bad, bad])["loss"])


def test_the_slowest_host_is_named_at_a_report(tmp_path, capsys):
  run = FakeRun(tmp_path)
  run.times = HostTimes(2)
  exchange = run.times.exchange

  def poll(updates: int) -> None:
    other = {"updates": updates, "update": updates, "data wait": 0.9 * updates}
    found = {"times/1": json.dumps({**other, "dispatch": 0.0})}
    exchange({**found, **exchange({}, 0)}, 0)

  def train_step(state: Any, batch: int) -> Any:
    if state.step in (4, 6):
      poll(state.step)
    return before(state, batch)

  before, run.train_step = run.train_step, train_step
  run.run()
  lines = [x for x in capsys.readouterr().out.splitlines() if "slowest" in x]
  # Once: nothing is new at the last report.
  assert len(lines) == 1
  assert "] slowest host: host 1 (?), data wait 0.9 s an update" in lines[0]
  written = [line.get("hosts/data_wait_slowest") for line in lines_of(tmp_path)]
  assert written == [None, pytest.approx(0.9), None]
