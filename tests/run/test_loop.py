"""The order of updates, evaluations, checkpoints and stops."""

from typing import Any

import pytest

from narvl_jax.errors import UserError
from tests.run.fake_run import FakeRun, lines_of


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
  # The state that is saved or evaluated is that of the step.
  steps = run.checkpoints.state_steps + run.state_steps
  assert [step for step, _ in steps] == [of for _, of in steps]
  # Otherwise the folder may vanish between the check and the save.
  saves = [i for i, event in enumerate(run.log) if event[0] == "save"]
  assert {run.log[i - 1] for i in saves} == {("wait",)}
  # One line a step, whoever wrote it.
  lines = {line["step"]: line for line in lines_of(tmp_path)}
  assert list(lines) == [4, 8, 10]
  assert lines[8]["validation/vqa/accuracy"] == 0.8
  assert lines[8]["train/loss"] == 6.5


def test_nothing_is_saved_into_a_removed_folder(tmp_path):
  run = FakeRun(tmp_path, checkpoint_every=3)
  run.robbed = True
  with pytest.raises(UserError, match="the folder is gone"):
    run.run()
  assert run.log == [("wait",)]


def test_resumed_run_keeps_the_steps(tmp_path):
  run = FakeRun(tmp_path, eval_every=4)
  assert run.run(first=7).step == 10
  assert run.events[0] == ("evaluate", 8)
  assert [line["step"] for line in lines_of(tmp_path)] == [8, 10]


def test_stop_saves_at_once_and_does_not_evaluate(tmp_path):
  run = FakeRun(tmp_path, eval_every=3, checkpoint_every=5)
  run.stop_at = 6
  assert run.run().step == 6
  assert run.events[-1] == ("save", 6, None)
  assert ("evaluate", 6) not in run.events
  assert run.saved[6]["evaluation_due"]
  assert not run.saved[5]["evaluation_due"]
  # What was measured since the last report is not lost.
  assert lines_of(tmp_path)[-1]["train/loss"] == 5.5


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
  assert lines_of(tmp_path)[-1]["train/loss"] == 2.5


@pytest.mark.parametrize("step", [5, 6])
def test_a_stop_where_nothing_was_to_be_evaluated(tmp_path, step):
  """Between two evaluations, or in a run without any."""
  run = FakeRun(tmp_path, eval_every=4 if step == 5 else 0)
  run.stop_at = step
  run.run()
  assert not run.saved[step]["evaluation_due"]


def test_metrics_are_on_disk_before_the_checkpoint(tmp_path):
  run = FakeRun(tmp_path, eval_every=4)
  seen = []

  def save(step: int, *_: Any, **__: Any) -> None:
    seen.append((step, lines_of(tmp_path)[-1]))

  run.checkpoints.save = save
  run.run()
  assert [(step, line["step"]) for step, line in seen] == [
    (4, 4),
    (8, 8),
    (10, 10),
  ]
  assert seen[0][1]["validation/vqa/accuracy"] == 0.4
