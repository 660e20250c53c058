"""Starts a command in several processes on this machine."""

import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.conftest import ROOT, xla_flags
from tests.support.terminal import without_progress


@dataclasses.dataclass
class Process:
  """One process; its output goes to files, since pipes may fill up."""

  running: subprocess.Popen
  out: pathlib.Path
  err: pathlib.Path

  @property
  def output(self) -> str:
    return self.out.read_text()

  @property
  def errors(self) -> str:
    return without_progress(self.err.read_text())

  def wait(self, timeout: float = 800) -> int:
    """Returns the exit code; a process that hangs is killed."""
    try:
      return self.running.wait(timeout)
    except subprocess.TimeoutExpired:
      self.running.kill()
      self.running.wait()
      raise

  def wait_for(self, text: str, timeout: float = 500) -> None:
    """Waits until the output contains `text`."""
    deadline = time.monotonic() + timeout
    while not re.search(text, self.output):
      assert self.running.poll() is None, self.output + self.errors
      assert time.monotonic() < deadline, self.output
      time.sleep(0.05)


def start(
  folder: pathlib.Path,
  arguments: Sequence[str],
  *,
  devices: int,
  name: str = "process",
) -> Process:
  """Starts `python ARGUMENTS` with fake CPU devices."""
  folder.mkdir(parents=True, exist_ok=True)
  files = folder / f"{name}.out", folder / f"{name}.err"
  environment = os.environ | {"XLA_FLAGS": xla_flags(devices)}
  # Takes precedence over the flag above.
  environment.pop("JAX_NUM_CPU_DEVICES", None)
  with files[0].open("w") as out, files[1].open("w") as err:
    running = subprocess.Popen(
      [sys.executable, *arguments],
      cwd=ROOT,
      env=environment,
      stdout=out,
      stderr=err,
      stdin=subprocess.DEVNULL,
    )
  return Process(running, *files)


def start_together(
  folder: pathlib.Path,
  arguments: Sequence[str],
  *,
  count: int = 2,
  devices: int = 4,
  only: Sequence[int] | None = None,
  extra: dict[int, Sequence[str]] | None = None,
) -> list[Process]:
  """Starts the processes of one multi-process run.

  Args:
    folder: receives their output.
    arguments: of python.
    count: number of processes.
    devices: per process.
    only: indices to start; default: all.
    extra: additional arguments by index.
  """
  address = f"127.0.0.1:{free_port()}"
  return [
    start(
      folder,
      [
        *arguments,
        f"--coordinator_address={address}",
        f"--num_processes={count}",
        f"--process_id={i}",
        *(extra or {}).get(i, ()),
      ],
      devices=devices,
      name=f"process{i}",
    )
    for i in (range(count) if only is None else only)
  ]


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]
