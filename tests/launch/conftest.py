"""A small checkout with the launch scripts, and only stand-ins on the PATH."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = ("gcloud", "kubectl", "xpk", "srun", "sbatch", "scontrol", "python")
TOOLS = """
awk basename bash cat cp cut date dirname env grep gzip head mkdir mv nohup od
rm sed seq setsid sleep tail tar tee touch tr
"""
# Arguments that every layer of quoting has to leave alone.
TRAIN_ARGS = [
  "--config=configs/shapes.py:quick",
  "--workdir=/mnt/shared/a run",
  "--config.data.image_size=(480,480)",
  """--config.note=it's "$HOME" & `*` \\ {x}""",
]


class Launcher:
  """Runs a launch script in a folder of its own."""

  def __init__(self, folder: pathlib.Path) -> None:
    self.folder = folder
    self.root = folder / "checkout"
    shutil.copytree(ROOT / "launch", self.root / "launch")
    (self.root / "narvl_jax").mkdir()
    self.bin = folder / "bin"
    self.bin.mkdir()
    for tool in TOOLS.split():
      path = shutil.which(tool)
      assert path, tool
      (self.bin / tool).symlink_to(path)
    # Without site packages, because that starts faster.
    text = (pathlib.Path(__file__).parent / "programs.py").read_text("utf-8")
    stand_in = folder / "programs"
    stand_in.write_text(f"#!{sys.executable} -IS\n{text}", "utf-8")
    stand_in.chmod(0o755)
    for name in (*PROGRAMS, "python3", "hostname"):
      (self.bin / name).symlink_to(stand_in)
    for host in ("w-0", "w-1"):
      (folder / "hosts" / host).mkdir(parents=True)
    self.environment = {
      "PATH": str(self.bin),
      "HOME": str(folder),
      "STAND_IN": str(folder),
    }
    self.plan()
    self._running: list[subprocess.Popen[str]] = []

  def plan(self, *rules: dict[str, Any]) -> None:
    """Sets what the stand-ins do; see `programs.py`."""
    path = self.folder / "plan.json"
    path.write_text(json.dumps(rules), encoding="utf-8")

  def start(
    self, script: str, *flags: str, train_args: list[str] | None = None
  ) -> subprocess.Popen[str]:
    """Starts a script; waits are short and logs go to `logs/`."""
    if train_args is None:
      train_args = TRAIN_ARGS
    process = subprocess.Popen(
      [
        # Jobs in the background of a shell inherit an ignored SIGINT, which no
        # script could then trap.
        "/usr/bin/env",
        "--default-signal=INT,TERM",
        "bash",
        f"launch/{script}",
        "--log_dir=logs",
        "--backoff_seconds=0",
        *flags,
        "--",
        *train_args,
      ],
      cwd=self.root,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self._running.append(process)
    return process

  def run(
    self, script: str, *flags: str, train_args: list[str] | None = None
  ) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end."""
    process = self.start(script, *flags, train_args=train_args)
    return self.end(process)

  def end(
    self, process: subprocess.Popen[str]
  ) -> subprocess.CompletedProcess[str]:
    out, error = process.communicate(timeout=3000)
    return subprocess.CompletedProcess(
      process.args, process.returncode, out, error
    )

  def calls(self, program: str) -> list[list[str]]:
    """Returns the arguments of each call of a program."""
    return [
      call[1:] for call in self._lines("calls.jsonl") if call[0] == program
    ]

  def events(self) -> list[list[str]]:
    return self._lines("events.jsonl")

  def secrets(self) -> list[list[str]]:
    """Returns (who, secret) of each process that trained."""
    return self._lines("secrets.jsonl")

  def passed(self) -> list[dict[str, str]]:
    """Returns the environment of each process that trained."""
    path = self.folder / "passed.jsonl"
    return [json.loads(x) for x in path.read_text("utf-8").splitlines()]

  def wait_for(self, *events: list[str]) -> None:
    """Waits until the stand-ins reported these events."""
    wait_until(lambda: all(event in self.events() for event in events))

  def log(self, name: str) -> str:
    return (self.root / "logs" / name).read_text(encoding="utf-8")

  def _lines(self, name: str) -> list[list[str]]:
    path = self.folder / name
    if not path.exists():
      return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

  def close(self) -> None:
    for process in self._running:
      if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=300)
      for stream in (process.stdout, process.stderr):
        if stream is not None:
          stream.close()
    # Stand-ins that a failed test left behind run programs of this folder.
    for event in pathlib.Path("/proc").glob("[0-9]*/environ"):
      try:
        own = f"STAND_IN={self.folder}".encode() in event.read_bytes()
        if own:
          os.kill(int(event.parent.name), signal.SIGKILL)
      except (OSError, ValueError):
        continue


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, f"not within {seconds} s"
    time.sleep(0.02)


@pytest.fixture
def launcher(tmp_path: pathlib.Path) -> Iterator[Launcher]:
  launcher = Launcher(tmp_path)
  yield launcher
  launcher.close()
