"""An activity as text and as a bar."""

import io

import pytest
from rich.console import Console

from narvl_jax.terminal.activity import Activity, drawn


class Clock:
  def __init__(self) -> None:
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


def activities() -> dict[str, Activity]:
  """Returns activities in the middle of their work."""
  clock = Clock()

  def halfway(
    text: str, total: int | None, unit: str, done: int, seconds: float
  ) -> Activity:
    clock.now = 0.0
    activity = Activity(text, total, unit, clock=clock)
    clock.now = seconds
    activity.done = done
    # Its clock is stopped.
    activity._clock = lambda: seconds
    return activity

  return {
    "compile": halfway("compiling the step", None, "", 0, 107.3),
    "vocabulary": halfway("training the vocabulary", None, "texts", 5120, 4.0),
    "start": halfway("evaluating test", 16_000, "examples", 0, 12.0),
    "middle": halfway("evaluating test", 16_000, "examples", 4000, 90.0),
    "end": halfway("evaluating test", 16_000, "examples", 16_000, 360.0),
    "bytes": halfway(
      "finding the rows of vqa_train.tsv", 9_400_000_000, "bytes", 18 * 10**8, 1
    ),
    "long": halfway(
      "reading the checkpoint of runs/a_long_name_of_a_run/with_more/below_it",
      None,
      "",
      0,
      3.0,
    ),
    "long_total": halfway(
      "finding the rows of a_long_name_of_a_file_of_questions_about_things.tsv",
      1000,
      "rows",
      10,
      3.0,
    ),
    "foreign": halfway("[red]\x1b]0;title\x07\nnext[/red]", 10, "", 1, 3.0),
    "wide": halfway("読み込み中 " * 12, 10, "examples", 3, 3.0),
    "empty": halfway("reading", 0, "records", 0, 1.0),
  }


@pytest.mark.parametrize("width", [80, 40])
def test_the_bar(width, golden):
  """Drawn by rich as on a terminal, without colours."""
  lines = []
  for name, activity in activities().items():
    console = Console(
      file=io.StringIO(),
      record=True,
      force_terminal=True,
      width=width,
      legacy_windows=False,
      _environ={},
    )
    console.print(drawn(activity, width - 1), end="")
    text = console.export_text(styles=False)
    assert text.count("\n") == 1, name
    lines.append(text.rstrip())
    assert len(lines[-1]) < width, name
  golden(f"terminal/bar_{width}.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize("width", [*range(1, 40)])
def test_no_terminal_is_too_narrow(width):
  for activity in activities().values():
    console = Console(file=io.StringIO(), width=width, _environ={})
    with console.capture() as capture:
      console.print(drawn(activity, width), end="")
    assert len(capture.get().rstrip("\n").splitlines()) == 1


def test_plain_lines(golden):
  lines = [activity.line() for activity in activities().values()]
  golden("terminal/lines.txt", "\n".join(lines) + "\n")


def test_the_speed_is_that_of_the_last_half_minute():
  clock = Clock()
  activity = Activity("working", 1000, "things", clock=clock)
  for second in range(1, 200):
    clock.now = second
    # The first minute compiles.
    activity.done = max(0, 2 * (second - 60))
    activity.rate()
  assert activity.rate() == pytest.approx(2.0)
  left = (1000 - activity.done) / 2
  assert f"{left / 60:.0f}m" in activity.progress()


def test_a_time_that_is_known_better_runs_down():
  clock = Clock()
  activity = Activity("training", 1000, "steps", done=900, clock=clock)
  activity.expect(125.0)
  assert activity.progress() == "900/1,000 steps  90 %  2m05s left"
  clock.now += 25
  assert activity.progress() == "900/1,000 steps  90 %  1m40s left"
  clock.now += 200
  assert activity.progress() == "900/1,000 steps  90 %  0s left"
  activity.expect(None)
  activity.done = 950
  assert activity.progress() == "950/1,000 steps  95 %  3m20s left"
