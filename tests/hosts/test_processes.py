"""Real processes on this machine: start, end, and what they compute."""

import json
import os
import pathlib
import re
import signal
import socket
from collections.abc import Sequence

import numpy as np
import pytest

from narvl_jax.checkpointing.record import stored_steps
from tests.programs import worker
from tests.support import runs
from tests.support.processes import Process, start, start_together

_HOST = socket.gethostname()
_TINY = "--config=tests/programs/tiny_run.py"


def _train(folder: pathlib.Path, *more: str) -> list[str]:
  return ["-m", "narvl_jax.train", _TINY, f"--workdir={folder}", *more]


def _work(folder: pathlib.Path, mode: str) -> list[str]:
  return [
    *("-m", "tests.programs.worker", f"--folder={folder}", f"--mode={mode}"),
    "--start_timeout=300",
  ]


def _wait(processes: Sequence[Process]) -> list[int]:
  return [process.wait() for process in processes]


def test_a_host_with_another_config_ends_all(tmp_path):
  run = tmp_path / "run"
  hosts = start_together(
    tmp_path,
    _train(run, "--start_timeout=300"),
    extra={1: ["--config.optimizer.learning_rate=0.5"]},
  )
  assert _wait(hosts) == [2, 2]
  line = (
    f"error: host 1 ({_HOST}): config differs: optimizer.learning_rate 0.5,"
    " host 0 0.001; start all hosts with the same code and flags\n"
  )
  assert [host.errors for host in hosts] == [line, line]
  # The first host alone prints on its terminal.
  assert f"process 0 of 2 on {_HOST} (from flags)" in hosts[0].output
  assert hosts[1].output == ""
  log = (run / "logs" / "host_001.log").read_text()
  assert f"process 1 of 2 on {_HOST}" in log
  assert log.endswith(line)
  # Nothing but the logs was written.
  assert [path.name for path in run.iterdir()] == ["logs"]


def test_a_missing_host_is_named(tmp_path):
  run = tmp_path / "run"
  arguments = _train(run, "--start_timeout=10")
  hosts = start_together(tmp_path, arguments, count=3, only=[0, 2])
  assert _wait(hosts) == [2, 2]
  for host in hosts:
    assert host.errors == (
      "error: process 1 did not connect within 10 s, of 3: check that it was"
      " started and reaches the coordinator (the list above), or raise"
      " --start_timeout\n"
    )
  checklist = hosts[0].output
  for words in (
    "coordinator 127.0.0.1:",
    "waiting up to 10 s for all. If this hangs, check that",
    "each with its own --process_id (0 to 2) and the same --num_processes=3",
    "there is free, and open in the firewall",
  ):
    assert words in checklist
  assert [path.name for path in run.iterdir()] == ["logs"]


def test_hosts_exchange_values(tmp_path):
  hosts = start_together(tmp_path, _work(tmp_path, "exchange"))
  assert _wait(hosts) == [0, 0], hosts[0].errors
  results = [
    json.loads((tmp_path / f"result{i}.json").read_text()) for i in (0, 1)
  ]
  for i, result in enumerate(results):
    assert result["values"] == [
      {"host": 0, "text": ""},
      {"host": 1, "text": "x" * 10},
    ]
    assert result["devices"] == 8
    # Each example once, also the one that both hosts evaluated.
    error = "1 of 6 examples were evaluated by no host, such as number 5"
    assert result["counts"] == [{"vqa": 5}, error]
    # data=2 runs over the hosts: each has half of the batch.
    assert result["rows"] == list(range(4 * i, 4 * i + 4))
    weights = np.arange(1, 9)[:, None]
    assert result["total"] == (np.arange(16).reshape(8, 2) * weights).sum()
  assert results[0]["missing"] == (
    f'barrier "late" failed on host 0 ({_HOST}) after at most 0.5 s:'
    f" host 1 ({_HOST}) did not arrive"
  )
  # Gloo and other libraries speak into the logs only.
  assert "[Gloo]" not in hosts[0].output
  assert hosts[0].output.endswith("printed by python\n")
  assert hosts[1].output == hosts[0].errors == hosts[1].errors == ""
  for i in (0, 1):
    log = (tmp_path / "logs" / f"host_00{i}.log").read_text()
    assert "printed by python\n" in log
    assert "printed below python\n" in log


def test_a_failure_on_one_host_ends_all_with_its_code(tmp_path):
  hosts = start_together(tmp_path, _work(tmp_path, "fail"))
  assert _wait(hosts) == [2, 2]
  line = f"host 1 ({_HOST}): error: no such picture\n"
  assert [host.errors for host in hosts] == [line, line]
  for i in (0, 1):
    log = (tmp_path / "logs" / f"host_00{i}.log").read_text()
    assert log.endswith(line)


def test_start_is_quiet(tmp_path):
  command = _train(tmp_path / "run", "--explain_sharding")
  plain = start(tmp_path, command, devices=8, name="plain")
  # Libraries warn when asked to; of us there is nothing.
  asked = start(tmp_path, ["-W", "default", *command], devices=8, name="asked")
  assert _wait([plain, asked]) == [0, 0]
  assert plain.errors == ""
  assert "narvl_jax" not in asked.errors
  for process in (plain, asked):
    assert "mesh data=8 fsdp=1 tensor=1" in process.output
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_host_ends_the_other(tmp_path):
  command = [*_work(tmp_path, "kill"), "--heartbeat_timeout=2"]
  hosts = start_together(tmp_path, command)
  assert hosts[1].wait() == -signal.SIGKILL
  assert hosts[0].wait() == 1
  (line,) = hosts[0].errors.splitlines()
  assert re.search(r"host 1 \(.*\) is lost: no sign of life for \d+ s", line)
  assert line.endswith("run the same command again to resume")


@pytest.mark.slow
def test_losses_do_not_depend_on_the_processes(tmp_path):
  hosts = start_together(tmp_path, _work(tmp_path, "losses"), devices=2)
  # One process with one device; the other meshes of one process are in
  # test_equal_losses.py.
  expected = runs.losses(runs.setup(), worker.STEPS)
  assert expected[-1] < 0.9 * expected[0]
  assert _wait(hosts) == [0, 0], hosts[0].errors
  for i in (0, 1):
    found = json.loads((tmp_path / f"losses{i}.json").read_text())
    for shape, losses in zip(worker.SHAPES, found, strict=True):
      np.testing.assert_allclose(
        losses, expected, rtol=1e-6, err_msg=str(shape)
      )


def _losses(run: pathlib.Path) -> list[float]:
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return [line["train/loss"] for line in lines]


@pytest.mark.slow
def test_the_number_of_processes_may_change(tmp_path):
  """Stopped by TERM to one of two, resumes as one process; and the reverse."""
  settings = (f"{_TINY}:16", "--config.train.eval_every=8")
  # Of one run only: it changes no number.
  traced = "--config.profile.steps=2", "--config.profile.start_step=1"
  folders = [tmp_path / "two_then_one", tmp_path / "one_then_two"]
  for run, counts in zip(folders, ((2, 1), (1, 2)), strict=True):
    for count in counts:
      arguments = ["-m", "narvl_jax.train", f"--workdir={run}", *settings]
      folder = tmp_path / f"{run.name}{count}"
      if run is folders[0] and count == 2:
        arguments += traced
      if count == 1:
        hosts = [start(folder, arguments, devices=2)]
      else:
        hosts = start_together(folder, arguments, devices=1)
      if count == counts[0]:
        hosts[0].wait_for(r"step +2/16")
        os.kill(hosts[-1].running.pid, signal.SIGTERM)
        assert _wait(hosts) == [0] * count, hosts[0].errors
        step = stored_steps(run / "checkpoints")[-1]
        assert f"\nSIGTERM: stopped at step {step}; " in hosts[0].output
      else:
        assert _wait(hosts) == [0] * count, hosts[0].errors
        assert f"resumed from the checkpoint of step {step}" in hosts[0].output
  files = (folders[0] / "traces" / "step_1").rglob("*.xplane.pb")
  assert {path.name.split(".")[0] for path in files} == {"host_000", "host_001"}
  losses = [_losses(run) for run in folders]
  assert len(losses[0]) == 16
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
  reports = [
    json.loads((run / "evaluation.json").read_text()) for run in folders
  ]
  assert reports[0] == reports[1]
