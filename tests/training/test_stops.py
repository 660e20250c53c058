"""Real processes that are stopped, killed, and stuck, phase by phase."""

import json
import pathlib
import shlex
import signal
import sys
from typing import Any

import numpy as np
import pytest

from narvl_jax.training import failures
from narvl_jax.training.checkpoints import FOLDER
from narvl_jax.training.watchdog import HANG_CODE
from tests.parallel.processes import Process, start, start_together

_TINY = "--config=tests/parallel/tiny_run.py"
_RESUME = "run the same command again to resume"


def _command(run: pathlib.Path, *more: str) -> list[str]:
  return ["-m", "tests.training.stopped_run", _TINY, f"--workdir={run}", *more]


def _happens(at: str, what: str = "term", step: int = 1) -> list[str]:
  return [f"--at={at}", f"--what={what}", f"--step={step}"]


def _alone(run: pathlib.Path, *more: str) -> Process:
  folder = run.parent / f"{run.name}_output"
  return start(folder, _command(run, *more), devices=1)


def _steps(run: pathlib.Path) -> list[int]:
  return sorted(
    int(x.name) for x in (run / FOLDER).iterdir() if x.name.isdigit()
  )


def _final_state(run: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns all that the last checkpoint holds."""
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


def _events(run: pathlib.Path) -> list[dict[str, Any]]:
  return failures.history(run)


@pytest.mark.slow
def test_stopped_in_every_phase_it_goes_on_to_the_same_end(tmp_path):
  """Compile, evaluation, restore, step and final evaluation, then the end."""
  whole, run = tmp_path / "whole", tmp_path / "run"
  assert _alone(whole).wait() == 0
  # Phase, what happens, and the step from which the next start goes on.
  for phase, what, step, saved in (
    ("compile", "term", 1, None),
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
  assert "restarts 6, 0s of work lost" in process.output
  ends = [x for x in _events(run) if x["event"] == "end"]
  assert {x["how"] for x in ends} == {"SIGTERM: stopped"}
  assert [(x["phase"], x["step"]) for x in ends] == [
    *[("compile", 0)] * 2,
    (None, 3),
    ("init", 0),
    (None, 5),
    ("evaluation", 6),
  ]
  _same_end(run, whole)


@pytest.mark.slow
def test_killed_failed_stuck_and_robbed_of_its_folder(tmp_path):
  """What the next start says of it, and what was lost."""
  run = tmp_path / "run"
  process = _alone(run, *_happens("step", "kill", 5))
  assert process.wait() == -signal.SIGKILL
  assert json.loads((run / "lock.json").read_text())["pid"]
  # The checkpoint of step 3, which may still have been on its way, or not.
  process = _alone(run, *_happens("step", "fail", 5))
  assert process.wait() == 1
  assert process.errors.endswith(f"mend the cause, then {_RESUME}\n"), (
    process.errors
  )
  assert "takes over from the run of host" in process.output
  assert "restart: ended without a word" in process.output
  hang = ["--config.watchdog.step=4"]
  process = _alone(run, *_happens("step", "hang", 5), *hang)
  assert process.wait() == HANG_CODE
  (stacks,) = (run / "stacks").iterdir()
  assert stacks.name.startswith("host_000_")
  assert "in _hang" in stacks.read_text()
  (line,) = process.errors.splitlines()
  assert line.startswith("watchdog: no progress for ")
  assert 'in phase "step" at step 4 (--config.watchdog.step=4)' in line
  assert line.endswith(f"stacks of all threads in {stacks}; {_RESUME}")
  process = _alone(run)
  assert process.wait() == 0, process.output + process.errors
  ends = [x for x in _events(run) if x["event"] == "end"]
  restarts = [x for x in _events(run) if x["event"] == "restart"]
  assert [x["how"].split(":")[0] for x in ends] == [
    "ended without a word",
    "failed",
    "watchdog",
  ]
  assert [x["how"] for x in restarts] == [x["how"] for x in ends]
  # The lock is written every few seconds.
  assert ends[0]["step"] in range(5)
  assert [(x["phase"], x["step"]) for x in ends[1:]] == [("step", 4)] * 2
  assert all(x["lost_seconds"] > 0 for x in restarts)
  assert "restarts 3, " in process.output
  # Where the folder itself vanishes there is nothing to go on from.
  process = _alone(tmp_path / "gone", *_happens("step", "remove_workdir", 4))
  assert process.wait() == 2
  (line,) = process.errors.splitlines()
  assert line.startswith("error: ")
  assert " gone" in line


@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path):
  """Of two that are started at once one wins; a later one is turned away."""
  run = tmp_path / "run"
  first = start(tmp_path / "a", _command(run), devices=1)
  second = start(tmp_path / "b", _command(run), devices=1)
  codes = first.wait(), second.wait()
  assert sorted(codes) == [0, 2], first.errors + second.errors
  lost = first if codes[0] else second
  (line,) = lost.errors.splitlines()
  assert line.startswith(f"error: --workdir={run} is in use: a run of host ")
  assert "or use another --workdir" in line
  assert not (run / "lock.json").exists()
  assert (run / "evaluation.json").exists()


def _together(
  run: pathlib.Path, *more: str, only: int | None = None
) -> list[Process]:
  folder = run.parent / f"{run.name}_output"
  if only is not None:
    more = (*more, f"--only_process={only}")
  return start_together(folder, _command(run, *more), devices=1)


def _wait(processes: list[Process]) -> list[int]:
  return [process.wait() for process in processes]


@pytest.mark.slow
def test_one_of_two_is_told_to_stop(tmp_path):
  """In the compiler, in an evaluation and in the loop; all end with code 0."""
  whole, run = tmp_path / "whole", tmp_path / "run"
  assert _wait(_together(whole)) == [0, 0]
  for phase, what, step, only, saved in (
    ("compile", "term_in_c", 1, 1, None),
    ("evaluation", "term", 2, 1, 3),
    ("step", "term", 5, 0, None),
  ):
    hosts = _together(run, *_happens(phase, what, step), only=only)
    assert _wait(hosts) == [0, 0], hosts[0].output + hosts[0].errors
    words = hosts[0].output + hosts[0].errors
    assert "SIGTERM: stopped" in words
    assert _RESUME in words
    assert "Traceback" not in words + hosts[1].errors
    steps = _steps(run) if (run / FOLDER).exists() else []
    if phase == "compile":
      assert steps == []
    elif saved is not None:
      assert steps == [saved]
    assert not (run / "lock.json").exists()
  hosts = _together(run)
  assert _wait(hosts) == [0, 0], hosts[0].output + hosts[0].errors
  assert "restarts 3, 0s of work lost" in hosts[0].output
  _same_end(run, whole)


@pytest.mark.slow
def test_a_stalled_peer_ends_all_with_stacks_of_both(tmp_path):
  run = tmp_path / "run"
  budgets = [f"--config.watchdog.{name}=6" for name in ("step", "data_wait")]
  hosts = _together(run, *_happens("data", "hang", 4), *budgets, only=1)
  assert _wait(hosts) == [HANG_CODE] * 2, hosts[0].output + hosts[0].errors
  found = {x.name[:8]: x.read_text() for x in (run / "stacks").iterdir()}
  assert sorted(found) == ["host_000", "host_001"]
  assert "in _hang" in found["host_001"]
  assert "in _hang" not in found["host_000"]
  assert "_settle" in found["host_000"] or "run" in found["host_000"]
  for host in hosts:
    (line,) = [x for x in host.errors.splitlines() if "watchdog: " in x]
    assert "no progress for " in line
    assert "Traceback" not in host.errors
  (end,) = _events(run)
  assert "watchdog: no progress" in end["how"]
  assert end["code"] == HANG_CODE
