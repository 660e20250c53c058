"""The loop with a step that costs nothing: what happens when."""

import contextlib
import json
import math
import pathlib
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.experiment.config import train_source
from narvl_jax.reliability.interrupt import EvaluationStopped, StopRequest
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run import progress as progress_lib
from narvl_jax.run.loop import Loop
from narvl_jax.run_folder.metrics import MetricsWriter
from narvl_jax.terminal.activity import Activity
from tests.support.tiny import tiny_config

_BAD_NUMBERS = ("policy", "limit", "spike_factor")


class FakeRun:
  """Everything around a loop; notes what the loop asks of it, in order."""

  def __init__(self, workdir: pathlib.Path, **settings: Any) -> None:
    config = tiny_config()
    config.train.update(
      {"steps": 10, "log_every": 4, "eval_every": 0, "checkpoint_every": 0}
    )
    for name, value in settings.items():
      section = config.bad_numbers if name in _BAD_NUMBERS else config.train
      section[name] = value
    self.config = config
    self.workdir = workdir
    self.events: list[tuple] = []
    # By the position of the batch; else the loss is the number of the step.
    self.losses: dict[int, float] = {}
    self.norms: dict[int, float] = {}
    self.stop = StopRequest()
    self.stop_at: int | None = None
    self.stop_in_evaluation = False
    self.robbed = False
    self.progress = "none"
    self.ready = True
    self.position = 0
    self.saved: dict[int, dict[str, Any]] = {}
    self.ledger = Ledger()
    self.writer = MetricsWriter(workdir)
    device = SimpleNamespace(device_kind="NVIDIA H200")
    self.setup = SimpleNamespace(
      experiment=SimpleNamespace(config=config),
      mesh=SimpleNamespace(size=8, devices=np.array([device])),
      step_flops=lambda: 1e6,
    )

  def run(self, first: int = 0, stored: dict[str, Any] | None = None) -> Any:
    anything: Any = self
    setup: Any = self.setup
    self.loop = Loop(
      setup=setup,
      step=self._step,
      batches=anything,
      writer=self.writer,
      checkpoints=anything,
      evaluate=self._evaluate,
      restore=self._restore,
      bundles=SimpleNamespace(write=self._write_bundle),  # pyright: ignore
      check_folder=self._check_folder,
      ledger=self.ledger,
      stop=self.stop,
      say=lambda text: self.events.append(("say", text)),
    )
    try:
      with self.stop:
        state: Any = SimpleNamespace(step=first)
        return self.loop.run(state, stored or {})
    finally:
      self.writer.close()

  def counters(self, position: int) -> dict[str, float]:
    n = position
    return {"a/examples": 16 * n, "a/epochs": n / 4, "a/bad": n // 5}

  def _step(self, state: Any, batch: int) -> Any:
    step = state.step + 1
    if step == self.stop_at:
      signal.raise_signal(signal.SIGTERM)
    loss: float = self.losses.get(batch, float(step))
    norm = self.norms.get(batch, 1.0)
    metrics = {
      "loss": np.float32(loss),
      "grad_norm": np.float32(norm),
      "learning_rate": np.float32(0.5),
      "infeasible_fraction": np.float32(0.25),
      "examples": np.float32(8),
      "skipped": np.float32(not math.isfinite(loss + norm)),
    }
    return SimpleNamespace(step=step), metrics

  def get(self) -> int:
    self.position += 1
    return self.position - 1

  def seek(self, position: int) -> None:
    self.events.append(("seek", position))
    self.position = position

  def check_errors(self) -> None:
    pass

  def _check_folder(self) -> None:
    if self.robbed:
      raise UserError("the folder is gone")

  def wait(self) -> None:
    self.events.append(("wait",))

  @property
  def last_step(self) -> int | None:
    return max(self.saved, default=None)

  def save(
    self, step: int, state: Any, *, score: float | None, run: dict[str, Any]
  ) -> None:
    assert state.step == step
    # Else the folder may vanish between the check and the save.
    assert self.events.pop() == ("wait",)
    self.events.append(("save", step, score))
    self.progress = f"saved {step}"
    # Through JSON, as on the disk.
    self.saved[step] = json.loads(json.dumps(run))

  def _restore(self) -> Any:
    step = self.last_step or 0
    self.events.append(("restore", step))
    return SimpleNamespace(step=step), step, self.saved.get(step, {})

  def _evaluate(self, state: Any, step: int) -> Any:
    assert state.step == step
    self.events.append(("evaluate", step))
    if self.stop_in_evaluation:
      raise EvaluationStopped
    return {"validation/vqa/accuracy": step / 10}, step / 10

  def _write_bundle(self, step: int, position: int, *_: Any) -> pathlib.Path:
    self.events.append(("bundle", step, position))
    return self.workdir / "bundle"


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


def test_nothing_is_saved_where_the_folder_is_gone(tmp_path):
  run = FakeRun(tmp_path, checkpoint_every=3)
  run.robbed = True
  with pytest.raises(UserError, match="the folder is gone"):
    run.run()
  assert run.events == [("wait",)]


def test_no_bundle_is_written_where_the_folder_is_gone(tmp_path):
  run = FakeRun(tmp_path)
  run.losses[4] = math.nan
  run.robbed = True
  with pytest.raises(UserError, match="the folder is gone"):
    run.run()
  assert run.events == []


def test_resumed_run_keeps_the_steps(tmp_path):
  run = FakeRun(tmp_path, eval_every=4)
  assert run.run(first=7).step == 10
  assert run.events[0] == ("evaluate", 8)
  assert [line["step"] for line in _lines(tmp_path)] == [8, 10]


def test_stop_saves_at_once_and_does_not_evaluate(tmp_path):
  run = FakeRun(tmp_path, eval_every=3, checkpoint_every=5)
  run.stop_at = 6
  assert run.run().step == 6
  assert run.events[-1] == ("save", 6, None)
  assert ("evaluate", 6) not in run.events
  assert run.saved[6]["evaluation_due"]
  assert not run.saved[5]["evaluation_due"]
  # What was measured since the last report is not lost.
  assert _lines(tmp_path)[-1]["train/loss"] == 5.5


def test_stop_at_the_last_step_is_the_end(tmp_path):
  run = FakeRun(tmp_path, eval_every=3)
  run.stop_at = 10
  run.run()
  assert run.events[-2:] == [("evaluate", 10), ("save", 10, 1.0)]
  assert not run.saved[10]["evaluation_due"]


def test_evaluation_that_is_stopped(tmp_path):
  run = FakeRun(tmp_path, eval_every=4)
  run.stop_in_evaluation = True
  assert run.run().step == 4
  assert run.events == [("evaluate", 4), ("save", 4, None)]
  assert run.saved[4]["evaluation_due"]
  assert _lines(tmp_path)[-1]["train/loss"] == 2.5


@pytest.mark.parametrize("step", [5, 6])
def test_a_stop_where_nothing_was_to_be_evaluated(tmp_path, step):
  """Between two evaluations, or in a run without any."""
  run = FakeRun(tmp_path, eval_every=4 if step == 5 else 0)
  run.stop_at = step
  run.run()
  assert not run.saved[step]["evaluation_due"]


@pytest.mark.parametrize(
  # At a report, between two, right before a checkpoint, at the very end.
  "step",
  [4, 6, 9, 10],
)
def test_broken_state_is_not_saved(tmp_path, step):
  run = FakeRun(tmp_path, checkpoint_every=3)
  run.losses[step - 1] = math.nan
  with pytest.raises(
    UserError,
    match=rf"the loss is nan at step {step}; lower --config.optimizer.learning_"
    r"rate or lengthen --config.optimizer.warmup_steps, in another --workdir,"
    r" or go on in this one without the batch: --config.bad_numbers.policy=skip"
    rf", or rollback; what led to it is in {tmp_path}/bundle$",
  ):
    run.run()
  saved = [event[1] for event in run.events if event[0] == "save"]
  assert saved == [s for s in (3, 6, 9) if s < step]
  assert run.events[-1] == ("bundle", step, step - 1)
  assert _lines(tmp_path)[-1]["step"] == step
  assert _lines(tmp_path)[-1]["train/loss"] is None


def test_infinite_gradient_breaks_the_state_too(tmp_path):
  run = FakeRun(tmp_path)
  run.norms[4] = math.inf
  with pytest.raises(UserError, match=r"the gradient norm is inf at step 5;"):
    run.run()
  assert run.events == [("bundle", 5, 4)]


def test_skipped_updates(tmp_path):
  run = FakeRun(tmp_path, policy="skip", limit=2, checkpoint_every=5)
  run.losses |= {1: math.nan, 6: math.inf}
  assert run.run().step == 10
  assert run.events == [
    ("bundle", 2, 1),
    ("say", f"the loss is nan at step 2: left out; see {tmp_path}/bundle"),
    ("save", 5, None),
    ("bundle", 7, 6),
    ("say", f"the loss is inf at step 7: left out; see {tmp_path}/bundle"),
    ("save", 10, None),
  ]
  lines = _lines(tmp_path)
  # Means are those of the updates that were made.
  assert [x["train/loss"] for x in lines] == [
    pytest.approx((1 + 3 + 4) / 3),
    pytest.approx((5 + 6 + 8) / 3),
    9.5,
  ]
  assert [x["train/skipped_updates"] for x in lines] == [1, 2, 2]
  stored = [run.saved[step] for step in (5, 10)]
  assert [x["skipped_updates"] for x in stored] == [1, 2]
  assert [x["data_position"] for x in stored] == [5, 10]


def test_too_many_skipped_updates(tmp_path):
  run = FakeRun(tmp_path, policy="skip", limit=2)
  run.losses |= {3: math.nan, 6: math.nan}
  # One of them before the run was resumed.
  with pytest.raises(
    UserError,
    match=r"nan at step 7, and 2 updates were skipped already; lower .*"
    r" or go on in this one: --config.bad_numbers.limit=4;",
  ):
    run.run(stored={"skipped_updates": 1})
  assert "save" not in {event[0] for event in run.events}


def test_rollback_goes_on_after_the_bad_batch(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", checkpoint_every=3, log_every=1)
  run.losses[8] = math.nan
  assert run.run().step == 10
  assert [event for event in run.events if event[0] != "say"] == [
    ("save", 3, None),
    ("save", 6, None),
    ("bundle", 9, 8),
    # What is on its way to the disk counts.
    ("wait",),
    ("restore", 6),
    ("seek", 9),
    ("save", 9, None),
    ("save", 10, None),
  ]
  assert run.events[3] == (
    "say",
    f"the loss is nan at step 9: left out; see {tmp_path}/bundle",
  )
  assert ("say", _BACK.format(9, 6, 1, 9)) in run.events
  lines = _lines(tmp_path)
  assert [line["step"] for line in lines] == list(range(1, 11))
  # Batches 6 to 8 were passed over.
  assert [line["data/a/examples"] for line in lines] == [
    16 * n for n in (1, 2, 3, 4, 5, 6, 10, 11, 12, 13)
  ]
  assert [line["train/rollbacks"] for line in lines] == [0] * 6 + [1] * 4
  positions = {step: x["data_position"] for step, x in run.saved.items()}
  assert positions == {3: 3, 6: 6, 9: 12, 10: 13}


_BACK = "back from step {} to {}, rollback {} of at most 10; on with batch {}"


def test_rollback_before_the_first_checkpoint_and_twice(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", limit=2, checkpoint_every=5)
  run.losses |= {1: math.nan, 4: math.nan}
  run.run()
  # Batch 4 comes in the third step after the second batch was passed over.
  assert [x[1:] for x in run.events if x[0] == "bundle"] == [(2, 1), (3, 4)]
  assert [x[1] for x in run.events if x[0] == "restore"] == [0, 0]
  assert run.saved[5]["data_position"] == 10
  assert run.saved[5]["rollbacks"] == 2


def test_too_many_rollbacks(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", limit=2)
  run.losses |= {1: math.nan, 4: math.nan, 5: math.nan}
  with pytest.raises(UserError, match=r"and 2 rollbacks were made already; "):
    run.run()


def test_bad_number_in_the_last_step(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", checkpoint_every=4)
  run.losses[9] = math.nan
  assert run.run().step == 10
  assert run.saved[10]["data_position"] == 12
  skipping = FakeRun(tmp_path, policy="skip")
  skipping.losses[9] = math.nan
  assert skipping.run().step == 10
  assert skipping.saved[10]["skipped_updates"] == 1


def test_stop_while_going_back(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", checkpoint_every=4)
  run.losses[5] = math.nan
  run.stop_at = 7
  # What there was to save is on disk already.
  assert run.run().step == 4
  assert [x[1] for x in run.events if x[0] == "save"] == [4]


def test_loss_spikes_are_counted_across_restarts(tmp_path):
  # The first spike is within the fewest losses that a median needs.
  losses = [1.0] * 9 + [50.0, 1.0, 3.1, 2.9, 50.0] + [1.0] * 6
  whole = FakeRun(tmp_path, steps=20, log_every=1, checkpoint_every=11)
  whole.losses = dict(enumerate(losses))
  whole.run()
  counts = [x["train/loss_spikes"] for x in _lines(tmp_path)]
  assert counts == [0] * 11 + [1] * 2 + [2] * 7
  assert str(whole.loop.health) == (
    "2 loss spikes, 0 updates skipped, 0 rollbacks"
  )
  again = FakeRun(tmp_path, steps=20, log_every=1)
  again.losses, again.position = whole.losses, 11
  again.run(11, whole.saved[11])
  assert [x["train/loss_spikes"] for x in _lines(tmp_path)] == counts[11:]
  for run in (whole, again):
    del run.saved[20]["time"]
  assert again.saved[20] == whole.saved[20]


def test_no_spike_factor_counts_nothing(tmp_path):
  run = FakeRun(tmp_path, steps=20, spike_factor=0.0)
  run.losses[15] = 1e6
  run.run()
  assert run.saved[20]["loss_spikes"] == 0


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
  step = run._step

  def slow_step(state: Any, batch: int) -> Any:
    now[0] += 0.0065
    state, metrics = step(state, batch)
    return state, metrics | {"infeasible_fraction": np.float32(0)}

  run._step = slow_step
  run.counters = lambda position: {}
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
  step = run._step

  def slow_step(state: Any, batch: int) -> Any:
    now[0] += 60.0
    return step(state, batch)

  run._step = slow_step
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
    ("100/100", "0s"),
  ]
  assert now[0] > 100 * 60


def test_no_spike_where_the_shares_of_the_data_change(tmp_path):
  """The level of the loss is another one; within it spikes still count."""
  losses = [1.0] * 15 + [9.0] * 15 + [90.0] + [9.0] * 9
  counts = {}
  for weight in (1.0, ((0, 1.0), (15, 2.0))):
    folder = tmp_path / str(weight)
    folder.mkdir()
    run = FakeRun(folder, steps=40, log_every=1, checkpoint_every=16)
    run.config.data.train.other = train_source("shapes", "vqa", weight=weight)
    run.losses = dict(enumerate(losses))
    run.run()
    counts[weight] = [x["train/loss_spikes"] for x in _lines(folder)]
  assert counts[1.0][15] == 1
  assert counts[1.0][-1] > 2
  assert counts[((0, 1.0), (15, 2.0))] == [0] * 30 + [1] * 10

  again = FakeRun(folder, steps=40, log_every=1)
  again.config = run.config
  again.setup = run.setup
  again.losses, again.position = run.losses, 16
  again.run(16, run.saved[16])
  assert [x["train/loss_spikes"] for x in _lines(folder)] == [0] * 14 + [1] * 10


def test_going_back_beyond_a_change_of_shares_forgets_losses_too(tmp_path):
  run = FakeRun(
    tmp_path, steps=40, log_every=1, checkpoint_every=14, policy="rollback"
  )
  run.config.data.train.other = train_source(
    "shapes", "vqa", weight=((0, 1.0), (15, 2.0))
  )
  run.losses = dict(enumerate([1.0] * 15 + [9.0] * 60)) | {16: math.nan}
  run.run()
  assert run.saved[40]["rollbacks"] == 1
  assert run.saved[40]["loss_spikes"] == 0


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
  monkeypatch.setattr(progress_lib, "peak_flops", lambda _: 1e6)
  run.run()
  line = _lines(tmp_path)[2]
  # 8 examples in a second on 8 devices of 1 MFLOP/s.
  assert line["train/examples_per_second"] == pytest.approx(8)
  assert line["train/examples_per_second_per_device"] == pytest.approx(1)
  assert line["train/data_wait"] == pytest.approx(0.25)
  assert line["train/mfu"] == pytest.approx(1 / 8)


def test_the_bar_follows_the_run(tmp_path, monkeypatch):
  shown = []

  @contextlib.contextmanager
  def doing(*args: Any, **settings: Any) -> Iterator[Activity]:
    shown.append((args, settings, Activity(*args, done=settings["done"])))
    yield shown[-1][2]

  monkeypatch.setattr(progress_lib, "doing", doing)
  run = FakeRun(tmp_path, checkpoint_every=4)
  run.position = 2
  run.run(2)
  ((args, settings, activity),) = shown
  assert args == ("training", 10, "steps")
  assert settings == {"done": 2, "only_live": True}
  assert activity.done == 10
  assert activity.progress().endswith(" left")
