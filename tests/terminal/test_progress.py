"""Progress of a command on a terminal and elsewhere."""

import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from absl import logging

from narvl_jax.reliability import session as hosts
from narvl_jax.terminal import progress
from narvl_jax.terminal.activity import Activity


class Terminal(io.TextIOWrapper):
  """A terminal of 80 columns that keeps its output."""

  def __init__(self) -> None:
    super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)
    self.closes = False

  def isatty(self) -> bool:
    return True

  def write(self, text: str) -> int:
    if self.closes:
      raise OSError("gone")
    return super().write(text)

  @property
  def text(self) -> str:
    buffer: Any = self.buffer
    return buffer.getvalue().decode()


def screen(text: str) -> list[str]:
  """Returns the lines that a terminal shows after output of a text."""
  lines = []
  text = re.sub(r"\x1b\[[\d;]*m", "", text)
  for line in text.split("\n"):
    shown: list[str] = []
    column = 0
    for part in re.findall(r"\r|\x1b\[2K|.", line):
      if part == "\r":
        column = 0
      elif part == "\x1b[2K":
        shown = []
      else:
        shown += " " * (column + 1 - len(shown))
        shown[column] = part
        column += 1
    lines.append("".join(shown).rstrip())
  return lines


@pytest.fixture
def open_terminal(monkeypatch) -> Callable[[], Terminal]:
  """Returns what makes stderr and stdout a terminal, drawn on without delay.

  It is to be called in the test itself: pytest sets the streams before.
  """
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "80")
  monkeypatch.setattr(progress, "_DRAW_SECONDS", 0.001)

  def opened() -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream

  return opened


def wait_for(condition: Callable[[], bool]) -> None:
  """Waits for the thread that draws."""
  event = threading.Event()
  for _ in range(4_000):
    if condition():
      return
    event.wait(0.005)
  raise AssertionError("it never came")


def test_plain_lines_come_at_growing_intervals():
  now, stream = [0.0], io.StringIO()

  def clock() -> float:
    return now[0]

  display = progress._Display(stream, live=False, clock=clock)
  times = []
  with display.showing(Activity("working", 1000, clock=clock)) as _:
    activity = display._activities[-1]
    while now[0] < 400:
      now[0] += 0.25
      activity.done = int(now[0])
      before = stream.getvalue()
      display.draw()
      if stream.getvalue() != before:
        times.append(now[0])
  assert times == [10, 20, 40, 80, 140, 200, 260, 320, 380]
  lines = stream.getvalue().splitlines()
  assert lines[0] == "progress: working: 10/1,000  1 %  16m30s left, 1.0 /s"
  assert lines[-1] == "progress: working: 380/1,000  38 %  10m20s left, 1.0 /s"


def test_the_innermost_activity_is_shown(open_terminal):
  terminal = open_terminal()
  with progress.doing("outer"):
    wait_for(lambda: "outer" in terminal.text)
    with progress.doing("inner") as inner:
      inner.advance(3)
      wait_for(lambda: "inner 3, 0s" in screen(terminal.text)[-1])
    wait_for(lambda: "outer" in screen(terminal.text)[-1])
  assert screen(terminal.text) == [""]


def test_nothing_stays_behind(open_terminal):
  terminal = open_terminal()
  before = threading.enumerate()

  def fail() -> None:
    with progress.doing("working"):
      wait_for(lambda: "working" in terminal.text)
      raise ValueError("fault")

  with pytest.raises(ValueError, match="fault"):
    fail()
  assert threading.enumerate() == before
  assert (sys.stdout, sys.stderr) == (terminal, terminal)
  assert screen(terminal.text) == [""]
  assert progress._display is None


def test_output_of_others_is_printed_above(open_terminal):
  terminal = open_terminal()
  handler = logging.get_absl_handler().python_handler
  logged = handler.stream
  handler.setStream(terminal)
  try:
    with progress.doing("working", 10, "things"):
      for line in ("first", "second"):
        wait_for(lambda: "working" in screen(terminal.text)[-1])
        print(line)
      wait_for(lambda: "working" in screen(terminal.text)[-1])
      print("begun", end=" ")
      drawn_so_far = terminal.text
      threading.Event().wait(0.05)
      # Nothing is drawn over a line that somebody has begun.
      assert terminal.text == drawn_so_far
      print("and ended")
      wait_for(lambda: "working" in screen(terminal.text)[-1])
      print("logged", file=handler.stream)
    assert handler.stream is terminal
  finally:
    handler.setStream(logged)
  lines = screen(terminal.text)
  assert lines == ["first", "second", "begun and ended", "logged", ""]


def test_a_closed_terminal_stops_nothing(open_terminal):
  terminal = open_terminal()
  with progress.doing("working") as working:
    wait_for(lambda: "working" in terminal.text)
    terminal.closes = True
    working.advance()
    threading.Event().wait(0.02)
    terminal.closes = False
  assert working.done == 1


def test_stdout_gets_no_progress(monkeypatch, open_terminal):
  terminal = open_terminal()
  out = io.StringIO()
  monkeypatch.setattr(sys, "stdout", out)
  with progress.doing("working"):
    wait_for(lambda: "working" in terminal.text)
    print("result")
  assert out.getvalue() == "result\n"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_without_a_cursor_gets_lines(
  monkeypatch, open_terminal, term
):
  terminal = open_terminal()
  monkeypatch.setenv("TERM", term)
  assert progress.terminal_of(terminal) is None
  monkeypatch.setattr(progress, "_GAPS", (0.001, 0.001))
  with progress.doing("working"):
    wait_for(lambda: "progress: working: 0s\n" in terminal.text)
  assert "\r" not in terminal.text
  assert "\x1b" not in terminal.text


def test_no_color(monkeypatch, open_terminal):
  terminal = open_terminal()
  monkeypatch.setenv("NO_COLOR", "1")
  with progress.doing("working", 10):
    wait_for(lambda: "working" in terminal.text)
  assert not re.search(r"\x1b\[3\dm", terminal.text)


def test_a_stream_into_a_log_is_not_drawn_on():
  class Tee(io.TextIOBase):
    def isatty(self) -> bool:
      return True

  tee: Any = Tee()
  assert progress.terminal_of(tee) is None


def test_nothing_is_shown_without_a_terminal(monkeypatch, open_terminal):
  terminal = open_terminal()
  with progress.muted(), progress.doing("muted") as working:
    working.advance()
    assert progress._display is None
  thread = threading.Thread(target=lambda: _work_alone("thread"))
  thread.start()
  thread.join()
  monkeypatch.setattr(sys, "stderr", None)
  _work_alone("no stderr")
  assert terminal.text == ""


def _work_alone(text: str) -> None:
  with progress.doing(text):
    assert progress._display is None


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", ">&- 2>&-"])
def test_a_closed_stderr(closed):
  code = """
from narvl_jax.terminal import progress
progress._DRAW_SECONDS, progress._GAPS = 0.001, (0.001, 0.001)
import time
with progress.doing("working", 10, "things") as working:
  for _ in range(10):
    working.advance()
    time.sleep(0.01)
assert working.done == 10
"""
  command = f"{sys.executable} -c '{code}' {closed}"
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  assert subprocess.call(command, shell=True, env=environment) == 0


def test_earlier_work_does_not_count_as_speed(open_terminal):
  open_terminal()
  with progress.doing("training", 1000, "steps", done=900) as training:
    assert training.rate() == 0
    assert training.progress().startswith("900/1,000 steps  90 %  0s")


def test_a_block_with_lines_of_its_own_shows_only_a_bar(
  monkeypatch, open_terminal
):
  terminal = open_terminal()
  with progress.doing("training", only_live=True):
    wait_for(lambda: "training" in terminal.text)
  stream = io.StringIO()
  monkeypatch.setattr(sys, "stderr", stream)
  with progress.doing("training", only_live=True):
    assert progress._display is None


def test_the_terminal_of_a_run_is_drawn_on(open_terminal, tmp_path):
  """A run whose terminal was closed opens a log and shows no bar."""
  terminal = open_terminal()
  log = tmp_path / "host_000.log"
  with hosts.outliving_terminal(tmp_path):
    with progress.doing("working"):
      wait_for(lambda: "working" in terminal.text)
      print("a line")
    assert screen(terminal.text) == ["a line", ""]
    assert not log.exists()
    terminal.closes = True
    with progress.doing("working on"):
      print("another line")
      threading.Event().wait(0.05)
    assert progress.terminal_of(sys.stdout) is None
    terminal.closes = False
  assert "another line" in log.read_text()
  assert "\x1b" not in log.read_text()
