"""The time that is left, from a run that is played on a fake clock."""

import pytest

from narvl_jax.run.eta import Eta, count_due


@pytest.mark.parametrize(
  ("first", "last", "every", "count"),
  [
    (0, 100, 0, 0),
    # The start of a run is not evaluated.
    (0, 100, 50, 1),
    (0, 101, 50, 2),
    (50, 100, 50, 1),
    (51, 100, 50, 0),
    (100, 100, 50, 0),
  ],
)
def test_count_of_what_is_due(first, last, every, count):
  assert count_due(first, last, every) == count


class PlayedRun:
  """A run whose steps, evaluations and saves take so many seconds."""

  def __init__(
    self,
    *,
    steps: int = 100,
    eval_every: int = 0,
    checkpoint_every: int = 0,
    final: float = 0.0,
    evaluation: float = 0.0,
    save: float = 0.0,
  ) -> None:
    self.steps, self.every = steps, (eval_every, checkpoint_every)
    self.costs = {"evaluation": evaluation, "checkpoint": save}
    self.final = final
    self.eta = self.fresh()

  def fresh(self) -> Eta:
    return Eta(
      self.steps,
      eval_every=self.every[0],
      checkpoint_every=self.every[1],
      final_evaluation=self.final,
    )

  def pauses(self, step: int) -> dict[str, float]:
    """Returns what comes after a step, as the loop decides it."""
    last = step == self.steps
    due = [every and (last or step % every == 0) for every in self.every]
    return {
      "evaluation": self.costs["evaluation"] * bool(due[0]),
      "checkpoint": self.costs["checkpoint"] * (any(due) or last),
    }

  def play(self, first: int, last: int, seconds: float, log: int = 10) -> None:
    """Trains from a step to another; reports every `log` steps."""
    spent = dict.fromkeys(self.costs, 0.0)
    for step in range(first + 1, last + 1):
      before = self.pauses(step - 1) if step - 1 > first else {}
      for name, value in before.items():
        spent[name] += value
      if step % log == 0:
        self.eta.add(step - log, step, training=log * seconds, **spent)
        spent = dict.fromkeys(self.costs, 0.0)

  def truth(self, step: int, seconds: float) -> float:
    """Returns what is left after the updates of a step."""
    left = (self.steps - step) * seconds
    for later in range(max(step, 1), self.steps + 1):
      left += sum(self.pauses(later).values())
    return left + self.final * self.costs["evaluation"]


def test_nothing_is_known_before_the_first_interval():
  assert PlayedRun().eta.seconds_left(0) is None


@pytest.mark.parametrize("step", [40, 50, 60, 100])
@pytest.mark.parametrize(
  "every", [(0, 0), (20, 0), (20, 20), (20, 30), (0, 10)]
)
def test_evaluations_and_saves_that_are_due_count(every, step):
  run = PlayedRun(
    eval_every=every[0],
    checkpoint_every=every[1],
    evaluation=40.0,
    save=3.0,
    final=2.5 if every[0] else 0.0,
  )
  run.play(0, step, 0.5)
  left = run.eta.seconds_left(step)
  truth = run.truth(step, 0.5)
  if not any(every):
    # The only save comes at the end, and nothing is known of it.
    truth -= 3.0
  assert left == pytest.approx(truth)


def test_evaluations_do_not_slow_down_the_steps():
  run = PlayedRun(steps=1000, eval_every=10, evaluation=100.0)
  run.play(0, 500, 0.1)
  quiet = PlayedRun(steps=1000)
  quiet.play(0, 500, 0.1)
  assert quiet.eta.seconds_left(500) == pytest.approx(50)
  assert run.eta.seconds_left(500) == pytest.approx(50 + 51 * 100)


def test_recent_intervals_decide():
  run = PlayedRun(steps=1000)
  run.play(0, 300, 9.0)
  run.play(300, 400, 1.0)
  assert run.eta.seconds_left(400) == pytest.approx(600)
  # One slow interval, such as that of a paused machine, changes nothing.
  run.play(400, 410, 500.0)
  assert run.eta.seconds_left(410) == pytest.approx(590)


def test_a_resumed_run_knows_only_its_own_intervals():
  run = PlayedRun(steps=1000, eval_every=100, evaluation=20.0)
  run.play(0, 500, 9.0)
  run.eta = run.fresh()
  assert run.eta.seconds_left(500) is None
  run.play(500, 590, 2.0)
  assert run.eta.seconds_left(590) == pytest.approx(820)
  # Once one was measured, five are due: four and that of the last step.
  run.play(590, 600, 2.0)
  run.eta.add(600, 610, training=20.0, evaluation=20.0, checkpoint=0.0)
  assert run.eta.seconds_left(610) == pytest.approx(780 + 4 * 20)


def test_after_a_rollback_more_is_left():
  run = PlayedRun(steps=100)
  run.play(0, 50, 2.0)
  assert run.eta.seconds_left(50) == pytest.approx(100)
  assert run.eta.seconds_left(20) == pytest.approx(160)


def test_an_interval_without_updates_is_no_speed():
  eta = Eta(10, eval_every=0, checkpoint_every=0)
  eta.add(3, 3, training=5.0, evaluation=0.0, checkpoint=0.0)
  assert eta.seconds_left(3) is None


def test_unmeasured_work_makes_it_a_lower_bound():
  run = PlayedRun(eval_every=50, evaluation=18.0, save=1.0)
  run.play(0, 40, 1.0)
  assert run.eta.is_lower_bound(40)
  run.play(40, 50, 1.0)
  # Its evaluation comes right after the step.
  assert run.eta.is_lower_bound(50)
  run.eta.add(50, 60, training=10.0, evaluation=18.0, checkpoint=0.0)
  assert not run.eta.is_lower_bound(60)
  run.eta = run.fresh()
  assert run.eta.is_lower_bound(60)


def test_the_first_evaluation_makes_it_an_upper_bound():
  """It also compiles, so the others are expected to be faster."""
  run = PlayedRun(eval_every=20, evaluation=300.0, save=1.0)
  run.play(0, 20, 1.0)
  assert not run.eta.is_upper_bound(20)
  run.eta.add(20, 30, training=10.0, evaluation=300.0, checkpoint=1.0)
  assert run.eta.is_upper_bound(30)
  run.eta.add(30, 50, training=10.0, evaluation=5.0, checkpoint=1.0)
  assert not run.eta.is_upper_bound(50)
  left = run.eta.seconds_left(50)
  assert left is not None
  assert left < 100


def test_only_due_work_makes_it_a_lower_bound():
  run = PlayedRun(checkpoint_every=20, save=1.0)
  run.play(0, 20, 1.0)
  assert run.eta.is_lower_bound(20)
  run.eta.add(20, 30, training=10.0, evaluation=0.0, checkpoint=1.0)
  # There are no evaluations.
  assert not run.eta.is_lower_bound(30)
