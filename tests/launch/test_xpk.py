"""GKE through xpk: the workload, its logs and its end."""

import shlex
import signal

import pytest

from tests.launch.conftest import TRAIN_ARGS, Launcher
from tests.launch.test_flags import IMAGE, XPK

LOGS = """[pod/narvl-0/jax-tpu] step 1
[pod/narvl-1/jax-tpu] step 1
[pod/narvl-0/jax-tpu] step 2 [done]
"""
RUNNING = {"if": "get pods & phase", "print": "Running Running"}
FOLLOW = {"if": "kubectl logs", "print": LOGS}


def jobset(state: str | None) -> dict[str, str]:
  """Sets the next output of `kubectl get jobset`; None: there is no jobset."""
  text = "" if state is None else f"narvl {state}"
  return {"if": "get jobset", "print": text}


def run(launcher: Launcher, *flags: str):
  return launcher.run("xpk.sh", *XPK, IMAGE, *flags)


def verbs(launcher: Launcher) -> list[str]:
  return [call[1] for call in launcher.calls("xpk")]


def test_a_workload_is_created_and_followed(launcher: Launcher):
  launcher.plan(jobset(None), RUNNING, FOLLOW, jobset("Completed"))
  result = run(launcher, "--num_slices=2", "--retries=5")
  assert result.returncode == 0, result.stderr
  assert verbs(launcher) == ["list", "create"]
  create = launcher.calls("xpk")[1]
  assert {
    "--num-slices=2",
    "--max-restarts=5",
    "--restart-on-exit-codes=1,75",
    "--termination-grace-period-seconds=300",
  } <= set(create)
  # The shell of the pod becomes Python, so that TERM reaches it.
  assert shlex.split(create[-1].removeprefix("--command=")) == [
    *("exec", "python", "-m", "narvl_jax.train"),
    *TRAIN_ARGS,
  ]


def test_each_pod_has_a_log(launcher: Launcher):
  launcher.plan(jobset(None), RUNNING, FOLLOW, jobset("Completed"))
  result = run(launcher)
  assert launcher.log("narvl-0.log") == "step 1\nstep 2 [done]\n"
  assert launcher.log("narvl-1.log") == "step 1\n"
  assert LOGS in result.stderr


@pytest.mark.parametrize(
  ("state", "expected"),
  [
    ("", ["list"]),  # It runs.
    ("Completed", ["list", "delete", "create"]),
    ("Failed", ["list", "delete", "create"]),
  ],
)
def test_a_workload_that_is_there(
  state: str, expected: list[str], launcher: Launcher
):
  launcher.plan(jobset(state), RUNNING, FOLLOW, jobset("Completed"))
  result = run(launcher)
  assert result.returncode == 0
  assert verbs(launcher) == expected


def test_waits_for_pods_and_follows_until_the_end(launcher: Launcher):
  launcher.plan(
    jobset(None),
    {"if": "phase", "print": ""},
    {"if": "phase", "print": "Running Pending"},
    RUNNING,
    {"if": "kubectl logs", "code": 1},
    {"if": "get jobset", "code": 1},  # Out of reach for a moment.
    RUNNING,
    FOLLOW,
    jobset("Completed"),
  )
  (launcher.bin / "sleep").unlink()
  (launcher.bin / "sleep").symlink_to(launcher.folder / "programs")
  result = run(launcher)
  assert result.returncode == 0
  assert [call[0] for call in launcher.calls("kubectl")] == [
    *("get", "get", "get", "get", "logs", "get"),
    *("get", "logs", "get"),
  ]
  assert "the stream of logs broke" in result.stdout
  assert launcher.log("narvl-0.log") == "step 1\nstep 2 [done]\n"


def test_waiting_for_pods_ends(launcher: Launcher):
  launcher.plan(jobset(None), {"if": "phase", "print": "Pending"})
  result = run(launcher, "--wait_seconds=0")
  assert result.returncode == 124
  assert "no pods run after --wait_seconds=0" in result.stdout
  assert "xpk workload delete" in result.stdout


@pytest.mark.parametrize(
  ("codes", "expected"), [("137 2 137", 2), ("0 134 137", 134), ("", 1)]
)
def test_a_failed_workload_is_not_created_again(
  codes: str, expected: int, launcher: Launcher
):
  # The cluster has made the retries.
  launcher.plan(
    jobset(None),
    RUNNING,
    FOLLOW,
    jobset("Failed"),
    {"if": "exitCode", "print": codes},
  )
  result = run(launcher)
  assert result.returncode == expected
  assert verbs(launcher) == ["list", "create"]


def test_creating_is_retried(launcher: Launcher):
  launcher.plan(
    {"if": "workload list", "code": 1},
    jobset(None),
    {"if": "workload create", "code": 1},
    jobset(None),
    RUNNING,
    FOLLOW,
    jobset("Completed"),
  )
  result = run(launcher)
  assert result.returncode == 0
  assert verbs(launcher) == ["list", "list", "create", "list", "create"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_deletes_the_workload_and_keeps_the_last_lines(
  number: signal.Signals, launcher: Launcher
):
  # Kubernetes sends TERM, waits for the grace time and sends KILL.
  launcher.plan(
    jobset(None), RUNNING, {"if": "kubectl logs", "print": LOGS, "hang": True}
  )
  process = launcher.start("xpk.sh", *XPK, IMAGE)
  launcher.wait_for(["kubectl", "logs"])
  process.send_signal(number)
  result = launcher.end(process)
  assert result.returncode == 128 + number
  assert verbs(launcher) == ["list", "create", "delete"]
  assert launcher.calls("xpk")[-1] == [
    *("workload", "delete", "--cluster=my-cluster", "--project=my-project"),
    *("--zone=us-west4-a", "--workload=narvl"),
  ]
  assert launcher.log("narvl-0.log") == "step 1\nstep 2 [done]\n"
