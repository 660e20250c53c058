"""TPU VMs and queued resources; each host is a folder, ssh runs in it."""

import os
import signal

import pytest

from tests.launch.conftest import TRAIN_ARGS, Launcher
from tests.launch.test_flags import TPU

SCRIPTS = ("tpu_vm.sh", "queued_resource.sh")
# A mistake of the user: the script ends there.
END = {"if": "remote.sh reset", "code": 2}
# Output of `describe` when everything is ready.
READY = (
  {
    "if": "describe narvl --zone=us-west4-a --project=my-project --format=value"
    "(networkEndpoints.len())",
    "print": "2",
    "times": 99,
  },
  {"if": "value(state)", "print": "READY", "times": 99},
  {"if": "value(state.state)", "print": "ACTIVE", "times": 99},
)


def steps(launcher: Launcher) -> list[str]:
  """Returns what gcloud was asked for, in short."""
  found = []
  for call in launcher.calls("gcloud"):
    verb = call[3]
    command = next((a for a in call if a.startswith("--command=")), "")
    for word in ("reset", "install", "run", "stop", "tar"):
      if f"remote.sh {word}" in command or f"{word} -x" in command:
        verb = word
    if "networkEndpoints.len()" not in " ".join(call):
      found.append(verb)
  return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_on_all_hosts(script: str, launcher: Launcher):
  launcher.plan(*READY)
  result = launcher.run(script, *TPU, '--setup_command=echo "set up" > disk')
  assert result.returncode == 0, result.stdout + result.stderr
  assert steps(launcher) == [
    *("describe", "reset", "scp", "tar", "install", "ssh", "run", "scp", "scp")
  ]
  for host in ("w-0", "w-1"):
    disk = launcher.folder / "hosts" / host / "disk"
    assert disk.read_text() == "set up\n"
  # The arguments arrive verbatim, once on each host.
  call = ["-m", "narvl_jax.train", *TRAIN_ARGS]
  assert launcher.calls("python") == [call, call]
  assert sorted(launcher.events()) == [["w-0", "start"], ["w-1", "start"]]
  # The logs of all hosts come back.
  for host in ("0", "1"):
    text = launcher.log(f"attempt-1/narvl-worker-{host}.log")
    assert text.strip() == f"training w-{host}"
  for stream in (result.stdout, launcher.log("attempt-1/stream.log")):
    assert "[w-0] training w-0" in stream
    assert "[w-1] training ended with exit code 0" in stream


def test_the_code_is_copied_without_runs_and_logs(launcher: Launcher):
  for name in (".git", "runs", "launch_logs", ".venv", "__pycache__"):
    folder = launcher.root / name
    folder.mkdir()
    (folder / "large").touch()
  (launcher.root / "narvl_jax" / "train.py").touch()
  stale = launcher.folder / "hosts" / "w-0" / "narvl_jax" / "narvl_jax"
  stale.mkdir(parents=True)
  (stale / "removed.py").touch()
  launcher.plan(*READY)
  launcher.run("tpu_vm.sh", *TPU)
  copy = launcher.folder / "hosts" / "w-0" / "narvl_jax"
  assert {path.name for path in copy.iterdir()} == {
    *("launch", "narvl_jax", ".venv", "launch_environment")
  }
  assert not (copy / ".venv" / "large").exists()
  assert [path.name for path in stale.iterdir()] == ["train.py"]


@pytest.mark.parametrize(
  ("state", "expected"),
  [
    (None, ["describe", "create"]),
    ("READY", ["describe"]),
    ("PREEMPTED", ["describe", "delete", "create"]),
    ("TERMINATED", ["describe", "delete", "create"]),
    ("CREATING", ["describe", "describe"]),  # Looks again.
  ],
)
def test_a_tpu_vm_is_created_where_needed(
  state: str | None, expected: list[str], launcher: Launcher
):
  first = [{"if": "value(state)", "print": state}] if state else []
  if state is None:
    first = [{"if": "value(state)", "code": 1}]
  launcher.plan(*first, END, *READY)
  result = launcher.run("tpu_vm.sh", *TPU, "--spot")
  assert result.returncode == 2
  assert steps(launcher)[: len(expected) + 1] == [*expected, "reset"]
  for call in launcher.calls("gcloud"):
    if call[3] == "create":
      assert call[4:] == [
        "narvl",
        "--zone=us-west4-a",
        "--project=my-project",
        "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite",
        "--spot",
        "--quiet",
      ]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_queued_resource_is_asked_for_and_waited_for(
  state: str, launcher: Launcher
):
  launcher.plan(
    {"if": "state.state", "print": state},
    {"if": "state.state", "code": 1},
    {"if": "state.state", "print": "WAITING_FOR_RESOURCES"},
    {"if": "state.state", "print": "PROVISIONING"},
    END,
    *READY,
  )
  (launcher.bin / "sleep").unlink()
  (launcher.bin / "sleep").symlink_to(launcher.folder / "programs")
  result = launcher.run("queued_resource.sh", *TPU)
  assert result.returncode == 2
  assert steps(launcher) == [
    *("describe", "delete", "describe", "create"),
    *("describe", "describe", "describe", "reset"),
  ]
  assert f"narvl is {state}; it is deleted" in result.stdout
  assert "narvl is PROVISIONING" in result.stdout


def test_waiting_for_a_queued_resource_ends(launcher: Launcher):
  launcher.plan({"if": "state.state", "print": "WAITING", "times": 9})
  result = launcher.run("queued_resource.sh", *TPU, "--wait_seconds=0")
  assert result.returncode == 124
  assert steps(launcher) == ["describe"]
  assert "not ACTIVE after --wait_seconds=0" in result.stdout
  assert "queued-resources delete narvl" in result.stdout


def test_a_failure_is_retried_from_the_start(launcher: Launcher):
  launcher.plan({"if": "train & @w-1", "code": 1}, *READY)
  result = launcher.run("queued_resource.sh", *TPU)
  assert result.returncode == 0
  assert steps(launcher).count("run") == 2
  assert "attempt 1 failed with exit code 1" in result.stdout
  assert "exit code 1" in launcher.log("attempt-1/stream.log")
  assert (launcher.root / "logs/attempt-2/narvl-worker-1.log").exists()


def test_a_preempted_run_is_resumed(launcher: Launcher):
  launcher.plan({"if": "narvl_jax.train", "hang": True, "times": 2}, *READY)
  process = launcher.start("tpu_vm.sh", *TPU, "--spot")
  launcher.wait_for(["w-0", "start"], ["w-1", "start"])
  for host in ("w-0", "w-1"):
    state = launcher.folder / "hosts" / host / "narvl_jax_state"
    os.kill(int((state / "attempt" / "pid").read_text()), signal.SIGTERM)
  result = launcher.end(process)
  assert result.returncode == 0, result.stdout
  assert "[w-0] training ended with exit code 75" in result.stdout
  own = [event for name, event in launcher.events() if name == "w-0"]
  assert own == ["start", "TERM", "saved", "start"]


def test_failures_of_each_step_are_retried(launcher: Launcher):
  launcher.plan(
    {"if": "tpu-vm scp", "code": 1},
    {"if": "remote.sh reset", "code": 255},
    {"if": "pip install", "code": 2},  # uv; no mistake of the user.
    *READY,
  )
  result = launcher.run("tpu_vm.sh", *TPU)
  assert result.returncode == 0
  assert "retry 3 of 3" in result.stdout
  assert len(launcher.events()) == 2


def test_a_mistake_on_any_host_is_not_retried(launcher: Launcher):
  # gcloud ends with the code of the first host that failed.
  launcher.plan(
    {"if": "train & @w-1", "code": 2},
    {"if": "train & @w-0", "code": 134},
    *READY,
  )
  result = launcher.run("tpu_vm.sh", *TPU)
  assert result.returncode == 2
  assert steps(launcher).count("run") == 1
  assert "training w-1" in launcher.log("attempt-1/narvl-worker-1.log")


def test_a_lost_connection_does_not_start_training_twice(launcher: Launcher):
  # gcloud repeats a command whose connection broke.
  launcher.plan({"if": "run --config", "repeat": True}, *READY)
  result = launcher.run("tpu_vm.sh", *TPU)
  assert result.returncode == 0
  assert sorted(launcher.events()) == [["w-0", "start"], ["w-1", "start"]]
  assert result.stdout.count("[w-0] training ended with exit code 0") == 2


@pytest.mark.parametrize(
  ("script", "number"),
  [("tpu_vm.sh", signal.SIGTERM), ("queued_resource.sh", signal.SIGINT)],
)
def test_stop_saves_on_all_hosts_and_fetches_the_logs(
  script: str, number: signal.Signals, launcher: Launcher
):
  launcher.plan({"if": "narvl_jax.train", "hang": True, "times": 2}, *READY)
  process = launcher.start(script, *TPU, "--delete")
  launcher.wait_for(["w-0", "start"], ["w-1", "start"])
  process.send_signal(number)
  result = launcher.end(process)
  assert result.returncode == 128 + number
  for host in ("w-0", "w-1"):
    own = [event for name, event in launcher.events() if name == host]
    assert own == ["start", "TERM", "saved"]
    assert f"[{host}] training ended with exit code 0" in result.stdout
  assert "saved" in launcher.log("attempt-1/narvl-worker-1.log")
  assert steps(launcher)[-5:] == ["run", "stop", "scp", "scp", "delete"]


def test_kill_after_the_grace_time(launcher: Launcher):
  launcher.plan(
    {"if": "train & @w-0", "hang": True},
    {"if": "train & @w-1", "hang": True, "deaf": True},
    *READY,
  )
  process = launcher.start("tpu_vm.sh", *TPU, "--grace_seconds=5")
  launcher.wait_for(["w-0", "start"], ["w-1", "start"])
  process.terminate()
  result = launcher.end(process)
  assert result.returncode == 143
  assert "[w-1] still running after 5 s: KILL" in result.stdout
  assert "[w-1] training ended with exit code 137" in result.stdout
  assert ["w-0", "saved"] in launcher.events()


def test_a_training_that_was_left_behind_is_stopped_first(launcher: Launcher):
  launcher.plan({"if": "narvl_jax.train", "hang": True, "times": 2}, *READY)
  process = launcher.start("tpu_vm.sh", *TPU)
  launcher.wait_for(["w-0", "start"], ["w-1", "start"])
  process.kill()  # The launching machine is lost.
  result = launcher.run("tpu_vm.sh", *TPU)
  assert result.returncode == 0
  own = [event for name, event in launcher.events() if name == "w-0"]
  assert own == ["start", "TERM", "saved", "start"]


def test_delete_also_after_a_failure(launcher: Launcher):
  launcher.plan({"if": "train & @w-0", "code": 2}, *READY)
  result = launcher.run("queued_resource.sh", *TPU, "--delete")
  assert result.returncode == 2
  last = launcher.calls("gcloud")[-1]
  assert last[2:5] == ["queued-resources", "delete", "narvl"]
  assert "--force" in last


@pytest.mark.parametrize(
  ("workdir", "noted"), [("--workdir=runs/a", True), ("--workdir=/a", False)]
)
def test_a_workdir_that_is_not_shared_is_noted(
  workdir: str, noted: bool, launcher: Launcher
):
  args = ["--config=a.py", workdir]
  result = launcher.run("tpu_vm.sh", *TPU, "--dry_run", train_args=args)
  assert ("note: --workdir is relative" in result.stdout) == noted
