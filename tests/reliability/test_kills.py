"""Processes that are killed, and those that see a NaN: real ones."""

import json
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
import pytest

from narvl_jax.run.bad_numbers import load_bundle
from narvl_jax.run_folder import times
from narvl_jax.run_folder.goodput import goodput
from tests.support.processes import Process, start, start_together

STEPS, EVERY = 80, 4
KILLS, IN_A_SAVE = 10, 4


def _command(workdir: pathlib.Path, config: str, *more: str) -> list[str]:
  return [
    *("-m", "narvl_jax.train", f"--config=tests/programs/{config}"),
    *(f"--workdir={workdir}", *more),
  ]


def _tiny(workdir: pathlib.Path, steps: int, *more: str) -> list[str]:
  settings = {
    "train.eval_every": 0,
    "train.checkpoint_every": EVERY,
    "evaluation.max_examples": 4,
  }
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  return _command(workdir, f"tiny_run.py:{steps}", *flags, *more)


def _stored(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """Returns every array of a checkpoint, read by orbax alone."""
  import orbax.checkpoint as ocp

  tree = {}
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  with ocp.PyTreeCheckpointer() as reader:
    for item in ("params", "optimizer", "ema"):
      folder = workdir / "checkpoints" / str(step) / item
      shapes = reader.metadata(folder).item_metadata.tree
      arguments = jax.tree.map(lambda _: as_numpy, shapes)
      tree[item] = reader.restore(folder, restore_args=arguments)
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def _assert_same_end(a: pathlib.Path, b: pathlib.Path, steps: int) -> None:
  expected, found = _stored(a, steps), _stored(b, steps)
  assert expected.keys() == found.keys()
  # Parameters, two moments and averages.
  assert len(expected) > 4 * 40
  for name, values in expected.items():
    np.testing.assert_array_equal(values, found[name], err_msg=name)
  losses = [
    [
      (line["step"], line["train/loss"])
      for line in map(
        json.loads, (run / "metrics.jsonl").read_text().splitlines()
      )
    ]
    for run in (a, b)
  ]
  assert losses[0] == losses[1]
  assert len(losses[0]) == steps


def _unfinished(workdir: pathlib.Path) -> set[str]:
  """Returns the checkpoints that are being written, or never were."""
  found = (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
  return {path.name for path in found}


def _wait_for_save(
  process: Process, workdir: pathlib.Path, number: int
) -> None:
  """Returns as soon as this process has begun its save of that number."""
  seen, before = set(), _unfinished(workdir)
  deadline = time.monotonic() + 300
  while len(seen) < number:
    assert process.running.poll() is None, process.output + process.errors
    assert time.monotonic() < deadline
    seen |= _unfinished(workdir) - before
    if "sumed from" in process.output:
      # The leftovers of the previous process were removed.
      before = set()
    time.sleep(0.001)


@pytest.mark.slow
def test_ten_kills(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  reference = start(tmp_path, _tiny(whole, STEPS), devices=1, name="whole")
  assert reference.wait() == 0, reference.errors
  rng = np.random.default_rng(0)
  inside = 0
  for i in range(KILLS):
    process = start(
      tmp_path, _tiny(killed, STEPS), devices=1, name=f"killed{i}"
    )
    _wait_for_save(process, killed, int(rng.integers(1, 3)))
    if i >= IN_A_SAVE:
      time.sleep(rng.uniform(0.0, 1.0))
    process.running.kill()
    assert process.wait() == -signal.SIGKILL
    inside += bool(_unfinished(killed))
  assert inside >= 3
  assert not (killed / "checkpoints" / str(STEPS)).exists()
  last = start(tmp_path, _tiny(killed, STEPS), devices=1, name="last")
  assert last.wait() == 0, last.errors
  _assert_same_end(whole, killed, STEPS)
  # Killed processes are recorded from their last sign of life.
  processes = times.history(killed)
  assert 2 <= len(processes) <= KILLS + 1
  spent = goodput(processes)
  assert 0 < spent.useful < spent.wall
  assert spent.lost["between processes"] > 0
  assert 0 < goodput(times.history(whole)).share < 1


def _two(folder: pathlib.Path, command: list[str]) -> list[Process]:
  """Starts two processes with a device each."""
  return start_together(folder, command, devices=1)


@pytest.mark.slow
def test_one_of_two_hosts_is_killed(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  steps = 16
  hosts = _two(tmp_path / "a", _tiny(whole, steps))
  assert [host.wait() for host in hosts] == [0, 0], hosts[0].errors
  rng = np.random.default_rng(1)
  command = _tiny(killed, steps, "--heartbeat_timeout=5")
  hosts = _two(tmp_path / "b", command)
  hosts[0].wait_for(rf"step +{rng.integers(5, 12)}/{steps} ")
  hosts[1].running.kill()
  codes = [host.wait() for host in hosts]
  assert codes[1] == -signal.SIGKILL
  assert codes[0] not in (0, None)
  assert not (killed / "checkpoints" / str(steps)).exists()
  hosts = _two(tmp_path / "c", _tiny(killed, steps))
  assert [host.wait() for host in hosts] == [0, 0], hosts[0].errors
  assert "resumed from the checkpoint of step" in hosts[0].output
  _assert_same_end(whole, killed, steps)


@pytest.mark.slow
def test_two_hosts_stop_at_a_nan_and_go_back(tmp_path):
  run = tmp_path / "run"
  command = _command(run, "nan_run.py")
  hosts = _two(tmp_path / "a", command)
  hosts[0].wait_for(r"step +4/10 ")
  assert [host.wait() for host in hosts] == [2, 2], hosts[0].errors
  for host in hosts:
    assert "the loss is nan at step 7; lower" in host.errors
  saved = {int(path.name) for path in (run / "checkpoints").iterdir()}
  assert max(saved) == 6
  # Each host has written its rows.
  folder = run / "bad_numbers" / "step_0000007"
  assert {path.name for path in folder.iterdir()} == {
    *("host_000.npz", "host_001.npz", "update.json"),
  }
  bundle = load_bundle(folder)
  assert np.isnan(bundle.batch["confidence"]).sum() == 1
  assert len(bundle.info["examples"]) == 8

  # All go back in the same step, and to the end.
  command = _command(run, "nan_run.py", "--config.bad_numbers.policy=rollback")
  hosts = _two(tmp_path / "b", command)
  assert [host.wait() for host in hosts] == [0, 0], hosts[0].errors
  assert "rolled back from step 7 to 6, rollback 1 of" in hosts[0].output
  lines = (run / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))
