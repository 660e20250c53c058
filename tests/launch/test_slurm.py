"""SLURM: the job that is queued, and what runs inside it."""

import json
import shlex
import signal
import subprocess

import pytest

from tests.launch.conftest import TRAIN_ARGS, Launcher

SRUN = ("slurm.sh", "--mode=srun", "--nodes=2")


def starts(launcher: Launcher) -> int:
  return sum(event[1] == "start" for event in launcher.events())


def test_a_job_is_queued_that_trains(launcher: Launcher):
  launcher.plan({"if": "sbatch", "print": "4711;cluster"})
  result = launcher.run("slurm.sh", "--nodes=2", "--grace_seconds=100")
  assert result.returncode == 0, result.stderr
  assert "job 4711; output: logs/job-4711.log" in result.stdout
  assert "scancel --batch --signal=TERM 4711" in result.stdout
  (call,) = launcher.calls("sbatch")
  assert "--signal=B:USR1@160" in call
  # What the job runs: a shell script, in the same folder.
  (script,) = (a for a in call if a.startswith("--wrap="))
  subprocess.run(
    ["bash", "-c", script.removeprefix("--wrap=")],
    cwd=launcher.root,
    env=launcher.environment,
    check=True,
    capture_output=True,
  )
  (call,) = launcher.calls("srun")
  assert call[-len(TRAIN_ARGS) :] == TRAIN_ARGS
  assert (
    launcher.calls("python") == [["-m", "narvl_jax.train", *TRAIN_ARGS]] * 2
  )
  assert launcher.log("task-0.log").strip() == "training 0"
  assert launcher.log("task-1.log").strip() == "training 1"


def test_the_job_gets_the_flags_of_the_user(launcher: Launcher):
  launcher.run(
    "slurm.sh", "--nodes=3", "--requeue", "--retries=7", "--python=/opt/python"
  )
  (call,) = launcher.calls("sbatch")
  (script,) = (a for a in call if a.startswith("--wrap="))
  words = shlex.split(script)
  for flag in ("--nodes=3", "--requeue=true", "--retries=7"):
    assert flag in words
  assert "--python=/opt/python" in words
  assert "--requeue" in call


def test_queueing_is_retried(launcher: Launcher):
  launcher.plan({"if": "sbatch", "code": 1}, {"if": "sbatch", "print": "5"})
  result = launcher.run("slurm.sh", "--nodes=1")
  assert result.returncode == 0
  assert len(launcher.calls("sbatch")) == 2
  assert "job 5;" in result.stdout


def test_a_failure_is_retried_in_the_same_job(launcher: Launcher):
  launcher.plan(
    {"if": "train & @1", "code": 1}, {"if": "train & @0", "hang": True}
  )
  result = launcher.run(*SRUN, "--grace_seconds=0")
  assert result.returncode == 0
  assert len(launcher.calls("srun")) == 2
  # The peer was killed (137), the cause is 1.
  assert "attempt 1 failed with exit code 1;" in result.stdout
  assert launcher.log("task-1.log").count("training 1") == 2


def test_a_mistake_is_not_retried(launcher: Launcher):
  launcher.plan(
    {"if": "train & @1", "code": 2}, {"if": "train & @0", "hang": True}
  )
  result = launcher.run(*SRUN, "--grace_seconds=0")
  assert result.returncode == 2
  assert len(launcher.calls("srun")) == 1
  assert "node1: task 1: Exited with exit code 2" in result.stderr


@pytest.mark.parametrize(
  ("number", "requeue", "code", "queued"),
  [
    (signal.SIGTERM, True, 143, False),  # The user.
    (signal.SIGINT, True, 130, False),
    (signal.SIGUSR1, True, 143, True),  # The time limit.
    (signal.SIGUSR1, False, 143, False),
  ],
)
def test_stop_saves_and_only_the_time_limit_queues_again(
  number: signal.Signals,
  requeue: bool,
  code: int,
  queued: bool,
  launcher: Launcher,
):
  launcher.plan({"if": "train", "hang": True, "times": 2})
  launcher.environment["SLURM_JOB_ID"] = "4711"
  process = launcher.start(*SRUN, f"--requeue={json.dumps(requeue)}")
  launcher.wait_for(["0", "start"], ["1", "start"])
  process.send_signal(number)
  result = launcher.end(process)
  assert result.returncode == code
  assert starts(launcher) == 2
  for who in ("0", "1"):
    own = [event for name, event in launcher.events() if name == who]
    assert own == ["start", "TERM", "saved"]
  expected = [["requeue", "4711"]] if queued else []
  assert launcher.calls("scontrol") == expected


def test_kill_after_the_grace_time(launcher: Launcher):
  launcher.plan({"if": "train", "hang": True, "deaf": True, "times": 2})
  process = launcher.start(*SRUN, "--grace_seconds=5")
  launcher.wait_for(["0", "start"], ["1", "start"])
  process.terminate()
  result = launcher.end(process)
  assert result.returncode == 143
  assert "still running after 5 s: KILL" in result.stdout
  own = [event for name, event in launcher.events() if name == "srun"]
  assert own == ["SIGTERM", "SIGINT", "SIGINT"]
