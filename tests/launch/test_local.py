"""Several processes on this machine: `launch/local.sh`."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.launch.conftest import ROOT, TRAIN_ARGS, Launcher, wait_until


def starts(launcher: Launcher) -> int:
  return sum(event[1] == "start" for event in launcher.events())


def test_every_process_gets_the_arguments_verbatim(launcher: Launcher):
  result = launcher.run("local.sh", "--processes=3", "--port=12345")
  assert result.returncode == 0, result.stderr
  calls = launcher.calls("python")
  assert len(calls) == 3
  for process, call in enumerate(sorted(calls)):
    assert call == [
      "-m",
      "narvl_jax.train",
      *TRAIN_ARGS,
      "--distributed=on",
      "--coordinator_address=127.0.0.1:12345",
      "--num_processes=3",
      f"--process_id={process}",
    ]


def test_each_output_has_a_file_and_the_first_is_shown(launcher: Launcher):
  result = launcher.run("local.sh", "--processes=2", "--port=1")
  assert "training 0" in result.stdout
  assert "training 1" not in result.stdout
  assert launcher.log("process-0.log").strip() == "training 0"
  assert launcher.log("process-1.log").strip() == "training 1"
  assert "ended with exit code 0; logs: logs" in result.stdout


# Anything, and the end by the watchdog.
@pytest.mark.parametrize("code", [1, 75])
def test_a_transient_failure_is_retried(code: int, launcher: Launcher):
  launcher.plan(
    {"if": "--process_id=1", "code": code, "times": 2},
    {"if": "--process_id=0", "hang": True, "times": 2},
  )
  result = launcher.run("local.sh", "--processes=2", "--port=1")
  assert result.returncode == 0
  assert starts(launcher) == 6
  line = f"attempt 1 failed with exit code {code}; retry 1 of 3 in 0 s"
  assert line in result.stdout
  # The log of one process contains all attempts.
  assert launcher.log("process-1.log").count("training 1") == 3


def test_retries_are_bounded(launcher: Launcher):
  launcher.plan({"if": "--process_id=0", "code": 7, "times": 9})
  result = launcher.run("local.sh", "--processes=1", "--port=1", "--retries=2")
  assert result.returncode == 7
  assert starts(launcher) == 3
  assert "no retry is left (--retries=2)" in result.stdout


def test_the_wait_before_a_retry_doubles(launcher: Launcher):
  # A stand-in for `sleep` reports the seconds.
  (launcher.bin / "sleep").unlink()
  (launcher.bin / "sleep").symlink_to(launcher.folder / "programs")
  launcher.plan({"if": "--process_id=0", "code": 7, "times": 9})
  launcher.run("local.sh", "--processes=1", "--port=1", "--backoff_seconds=100")
  waits = [float(call[0]) for call in launcher.calls("sleep")]
  assert [wait for wait in waits if wait > 1] == [100, 200, 400]


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_mistakes_and_stops_are_not_retried(code: int, launcher: Launcher):
  launcher.plan({"if": "--process_id=0", "code": code, "times": 9})
  result = launcher.run("local.sh", "--processes=1", "--port=1")
  assert result.returncode == code
  assert starts(launcher) == 1


def test_a_failure_stops_the_others_and_is_reported(launcher: Launcher):
  launcher.plan(
    {"if": "--process_id=0", "hang": True},
    {"if": "--process_id=1", "code": 3, "print": "out of memory", "after": 3},
    {"if": "--process_id=2", "hang": True},
  )
  result = launcher.run("local.sh", "--processes=3", "--port=1", "--retries=0")
  assert result.returncode == 3
  assert (
    "process 1 ended with exit code 3; the last lines of logs/process-1.log:"
    in result.stdout
  )
  assert "  | training 1 out of memory" in result.stdout
  assert ["0", "TERM"] in launcher.events()
  assert ["2", "TERM"] in launcher.events()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_sends_term_and_waits_for_the_save(
  number: signal.Signals, launcher: Launcher
):
  launcher.plan({"if": "--process_id", "hang": True, "times": 2})
  process = launcher.start("local.sh", "--processes=2", "--port=1")
  launcher.wait_for(["0", "start"], ["1", "start"])
  process.send_signal(number)
  result = launcher.end(process)
  assert result.returncode == 128 + number
  for who in ("0", "1"):
    own = [event for name, event in launcher.events() if name == who]
    assert own == ["start", "TERM", "saved"]
    assert "saved" in launcher.log(f"process-{who}.log")
  assert "KILL" not in result.stdout.split("then KILL")[1]
  assert starts(launcher) == 2  # No retry.


def test_kill_after_the_grace_time(launcher: Launcher):
  launcher.plan(
    {"if": "--process_id=0", "hang": True},
    {"if": "--process_id=1", "hang": True, "deaf": True},
  )
  process = launcher.start(
    "local.sh", "--processes=2", "--port=1", "--grace_seconds=5"
  )
  launcher.wait_for(["0", "start"], ["1", "start"])
  process.terminate()
  result = launcher.end(process)
  assert result.returncode == 143
  assert "still running after 5 s: KILL" in result.stdout
  assert ["0", "saved"] in launcher.events()
  assert ["1", "TERM"] in launcher.events()
  assert not _alive(launcher.folder)


def _alive(folder: pathlib.Path) -> list[str]:
  """Returns the stand-ins for training that still run."""
  found = []
  for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      line = (process / "cmdline").read_bytes()
    except OSError:
      continue
    if b"narvl_jax.train" in line and str(folder).encode() in line:
      found.append(process.name)
  return found


def test_ctrl_c_reaches_only_the_script(launcher: Launcher):
  # A terminal sends Ctrl-C to a whole process group.
  launcher.plan({"if": "--process_id=0", "hang": True})
  process = launcher.start("local.sh", "--processes=1", "--port=1")
  launcher.wait_for(["0", "start"])
  (child,) = _alive(launcher.folder)
  assert os.getpgid(int(child)) != os.getpgid(process.pid)
  process.send_signal(signal.SIGINT)
  assert launcher.end(process).returncode == 130


def test_stop_while_waiting_for_a_retry(launcher: Launcher):
  launcher.plan({"if": "--process_id=0", "code": 1})
  process = launcher.start(
    "local.sh", "--processes=1", "--port=1", "--backoff_seconds=600"
  )
  launcher.wait_for(["0", "start"])
  wait_until(lambda: not _alive(launcher.folder))
  process.terminate()
  assert launcher.end(process).returncode == 143


def test_fake_devices(launcher: Launcher):
  (launcher.bin / "python").unlink()
  (launcher.bin / "python").write_text(
    '#!/bin/bash\necho "$JAX_PLATFORMS / $XLA_FLAGS"\n'
  )
  (launcher.bin / "python").chmod(0o755)
  launcher.run("local.sh", "--processes=2", "--devices=4", "--port=1")
  expected = "cpu / --xla_force_host_platform_device_count=4"
  assert launcher.log("process-0.log").strip() == expected
  assert launcher.log("process-1.log").strip() == expected


def test_a_free_port_is_found(launcher: Launcher):
  (launcher.bin / "python").unlink()
  python = launcher.bin / "python"
  python.write_text(
    f'#!/bin/bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\necho "$@"\n'
  )
  python.chmod(0o755)
  launcher.run("local.sh", "--processes=2")
  addresses = {
    word
    for process in (0, 1)
    for word in launcher.log(f"process-{process}.log").split()
    if word.startswith("--coordinator_address=127.0.0.1:")
  }
  (address,) = addresses
  assert int(address.rsplit(":")[-1]) > 1023


@pytest.mark.slow
def test_real_processes_stop_with_a_save_and_resume(tmp_path: pathlib.Path):
  command = [
    *("bash", "launch/local.sh", "--processes=2", "--devices=2"),
    "--retries=0",
    *(f"--python={sys.executable}", f"--log_dir={tmp_path / 'logs'}", "--"),
    "--config=tests/programs/tiny_run.py:100000",
    *(f"--workdir={tmp_path / 'run'}", "--config.train.eval_every=100000"),
  ]
  first, out = _train_and_stop(command, tmp_path / "run", 1)
  assert "resumed" not in out
  last, out = _train_and_stop(command, tmp_path / "run", first + 1)
  assert f"resumed from the checkpoint of step {first}" in out
  assert last > first


def _train_and_stop(
  command: list[str], workdir: pathlib.Path, step: int
) -> tuple[int, str]:
  """Sends TERM after a step; returns the step that was saved, the output."""
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  metrics = workdir / "metrics.jsonl"
  try:
    wait_until(
      lambda: (
        process.poll() is not None
        or (metrics.exists() and f'"step": {step},' in metrics.read_text())
      ),
      seconds=400,
    )
    process.terminate()
    out, _ = process.communicate(timeout=300)
  finally:
    process.terminate()
  assert process.returncode == 143, out
  # A later start reports it once more.
  saved = re.findall(r"^SIGTERM: stopped at step (\d+)", out, re.MULTILINE)
  assert len(saved) == 1, out
  return int(saved[0]), out
