"""Real processes that are stopped, killed, and stuck, phase by phase."""

import contextlib
import json
import pathlib
import shlex
import signal
import sys
from typing import Any

import numpy as np
import pytest

from narvl_jax.checkpointing.writing import FOLDER
from narvl_jax.reliability.watchdog import HANG_CODE
from narvl_jax.run_folder import restarts as failures
from tests.support.disks import small_disk
from tests.support.processes import Process, start, start_together

_TINY = "--config=tests/programs/tiny_run.py"
_RESUME = "run the same command again to resume"


def _command(run: pathlib.Path, *more: str) -> list[str]:
  return ["-m", "tests.programs.stopped_run", _TINY, f"--workdir={run}", *more]


def _happens(at: str, what: str, step: int = 1) -> list[str]:
  return [f"--at={at}", f"--what={what}", f"--step={step}"]


def _alone(run: pathlib.Path, *more: str) -> Process:
  folder = run.parent / f"{run.name}_output"
  return start(folder, _command(run, *more), devices=1)


def _together(run: pathlib.Path, *more: str) -> list[Process]:
  """Starts two processes; what happens does so in the second one."""
  folder = run.parent / f"{run.name}_output"
  command = _command(run, *more, "--only_process=1")
  return start_together(folder, command, devices=1)


def _wait(processes: list[Process]) -> list[int]:
  return [process.wait() for process in processes]


def _steps(run: pathlib.Path) -> list[int]:
  names = [path.name for path in (run / FOLDER).glob("*")]
  return sorted(int(name) for name in names if name.isdigit())


def _final_state(run: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns all that the last checkpoint contains."""
  import orbax.checkpoint as ocp
  from etils import epath

  step = _steps(run)[-1]
  leaves = {}
  for item in ("params", "optimizer", "ema"):
    handler = ocp.StandardCheckpointHandler()
    folder = epath.Path(run / FOLDER / str(step) / item).absolute()
    tree = handler.restore(folder)
    for path, leaf in ocp.tree.to_flat_dict(tree).items():
      leaves[f"{item}/{'/'.join(path)}"] = np.asarray(leaf)
  return leaves


def _same_end(run: pathlib.Path, other: pathlib.Path) -> None:
  expected, found = _final_state(other), _final_state(run)
  assert expected.keys() == found.keys()
  for name, leaf in expected.items():
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)
  reports = [
    json.loads((folder / "evaluation.json").read_text())
    for folder in (run, other)
  ]
  assert reports[0] == reports[1]
  validations = [
    [
      {k: v for k, v in json.loads(line).items() if k.startswith("validation")}
      | {"step": json.loads(line)["step"]}
      for line in (folder / "metrics.jsonl").read_text().splitlines()
      if '"validation/' in line
    ]
    for folder in (run, other)
  ]
  assert validations[0] == validations[1] != []


def _events(run: pathlib.Path) -> list[dict[str, Any]]:
  return failures.history(run)


@pytest.mark.slow
def test_stopped_in_every_phase_it_resumes_to_the_same_end(tmp_path):
  """Compile, evaluation, restore, step and final evaluation, then the end."""
  whole, run = tmp_path / "whole", tmp_path / "run"
  assert _alone(whole).wait() == 0
  # Phase, what happens, and the step from which the next start resumes.
  for phase, what, step, saved in (
    ("compile", "term_in_c", 1, None),
    ("evaluation", "term", 2, 3),
    ("restore", "term_in_c", 1, 3),
    ("step", "term", 5, 5),
    ("final", "term_in_c", 1, 6),
  ):
    command = _happens(phase, what, step)
    process = _alone(run, *command)
    assert process.wait() == 0, process.output + process.errors
    words = process.output + process.errors
    assert "Traceback" not in words
    assert "SIGTERM: stopped" in words
    original = [sys.executable, *_command(run, *command)]
    assert f"{_RESUME}: {shlex.join(original)}\n" in words
    assert max(_steps(run), default=None) == saved
    assert not (run / "lock.json").exists()
  process = _alone(run)
  assert process.wait() == 0, process.output + process.errors
  assert "resumed from the checkpoint of step 6" in process.output
  assert "restarts 5, 0s of work lost" in process.output
  ends = [x for x in _events(run) if x["event"] == "end"]
  assert {x["how"] for x in ends} == {"SIGTERM: stopped"}
  assert [(x["phase"], x["step"]) for x in ends] == [
    ("compile", 0),
    (None, 3),
    ("init", 0),
    (None, 5),
    ("evaluation", 6),
  ]
  _same_end(run, whole)


@pytest.mark.slow
def test_killed_stuck_and_without_its_folder(tmp_path):
  """The report of the next start, and the lost work."""
  run = tmp_path / "run"
  first = _alone(run, *_happens("step", "hang", 5))
  first.wait_for("step +3/6")
  other = start(tmp_path / "other", _command(run), devices=1)
  assert other.wait() == 2
  (line,) = other.errors.splitlines()
  assert line.startswith(f"error: --workdir={run} is in use: a run of host ")
  assert f"process {first.running.pid}, since 20" in line
  assert 'in phase "step" at step 4); stop it (kill ' in line
  first.running.kill()
  assert first.wait() == -signal.SIGKILL
  hang = ["--config.watchdog.step=4"]
  process = _alone(run, *_happens("step", "hang", 5), *hang)
  assert process.wait() == HANG_CODE, process.output + process.errors
  (stacks,) = (run / "stacks").iterdir()
  assert stacks.name.startswith("host_000_")
  assert "in _stall" in stacks.read_text()
  (line,) = process.errors.splitlines()
  assert line.startswith("watchdog: no progress for ")
  assert 'in phase "step" at step 4 (--config.watchdog.step=4)' in line
  assert line.endswith(f"stacks of all threads in {stacks}; {_RESUME}")
  events = _events(run)
  process = _alone(run, *_happens("step", "remove_workdir", 5))
  assert process.wait() == 2, process.output + process.errors
  assert "restart: watchdog: no progress for " in process.output
  # Without the folder there is nothing to resume from.
  (line,) = process.errors.splitlines()
  assert line.startswith("error: ")
  assert " no longer exist" in line
  assert [x["event"] for x in events] == ["end", "restart", "end"]
  killed, restart, stuck = events
  for event in (killed, restart):
    assert event["how"].startswith("ended unexpectedly: killed, or ")
  assert stuck["how"].startswith("watchdog: no progress for ")
  for event in events:
    assert (event["phase"], event["step"]) == ("step", 4)
  assert restart["from_step"] == 3
  assert restart["lost_seconds"] > 0
  assert restart["down_seconds"] > 0


@pytest.mark.slow
def test_one_of_two_is_stopped_and_stalls(tmp_path):
  """All end: in the compiler, within an evaluation, and without a word."""
  run = tmp_path / "run"
  # Time for the other one to hear of it before there is no batch left.
  long = ["--config.train.eval_examples=48"]
  for happens, text, saved in (
    (_happens("compile", "term_in_c"), "SIGTERM: stopped; ", []),
    (
      _happens("evaluation", "term_and_wait", 2),
      "SIGTERM: stopped at step 3; ",
      [3],
    ),
  ):
    hosts = _together(run, *happens, *long)
    assert _wait(hosts) == [0, 0], hosts[0].output + hosts[0].errors
    words = hosts[0].output + hosts[0].errors
    assert text in words
    assert f"{_RESUME}, on all hosts or by what started them: " in words
    assert "Traceback" not in words + hosts[1].errors
    assert _steps(run) == saved
    assert not (run / "lock.json").exists()
  budgets = [f"--config.watchdog.{name}=6" for name in ("step", "data_wait")]
  hosts = _together(run, *_happens("data", "hang", 2), *budgets, *long)
  assert _wait(hosts) == [HANG_CODE] * 2, hosts[0].output + hosts[0].errors
  assert "resumed from the checkpoint of step 3" in hosts[0].output
  found = {x.name[:8]: x.read_text() for x in (run / "stacks").iterdir()}
  assert sorted(found) == ["host_000", "host_001"]
  assert "in _stall" in found["host_001"]
  assert "in _stall" not in found["host_000"]
  assert "run/loop.py" in found["host_000"]
  for host in hosts:
    (line,) = [x for x in host.errors.splitlines() if "watchdog: " in x]
    assert "no progress for " in line
    assert "Traceback" not in host.errors
  end = _events(run)[-1]
  assert "watchdog: no progress" in end["how"]
  assert end["code"] == HANG_CODE


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fill_disk", "short_files"])
def test_no_room_for_a_checkpoint(tmp_path, what):
  """A full disk, and a limit for files that needs no privilege."""
  with contextlib.ExitStack() as stack:
    run = tmp_path / "disk" / "run"
    if what == "fill_disk":
      stack.enter_context(small_disk(run.parent, 8000))
    process = start(
      tmp_path / "output", _command(run, *_happens("step", what, 5)), devices=1
    )
    assert process.wait() == 2, process.output + process.errors
    (line,) = process.errors.splitlines()
    assert line.startswith("error: ")
    reason = {"fill_disk": "No space left", "short_files": "File too large"}
    assert reason[what] in line
    # What could be saved is; what could not is no checkpoint.
    assert _steps(run) == [3]
    assert not (run / "lock.json").exists()
    (run / "filler").unlink(missing_ok=True)
    process = _alone(run)
    assert process.wait() == 0, process.output + process.errors
    assert "resumed from the checkpoint of step 3" in process.output
