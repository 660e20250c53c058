"""Worker processes that die, and what they leave behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

_DYING = """
import os, sys
from tests.data.batches.test_workers import _start, make_tasks
from narvl_jax.data.batches import pipeline
from absl import flags

def main(mode):
  flags.FLAGS.mark_as_parsed()
  large = mode == "worker of large batches dies"
  batches = _start(
    make_tasks(),
    0,
    range(12),
    # As text and pictures of some hundred kB.
    image_size=(64, 64) if large else (6, 8),
    max_text_length=2000 if large else 24,
    num_workers=2 if large else 1,
    num_threads=2,
    prefetch=4,
  )
  next(batches)
  import multiprocessing, time
  worker = multiprocessing.active_children()[0]
  if large:
    # Until all buffers are full.
    time.sleep(3)
  print(worker.pid, *batches._segments.names[0], flush=True)
  if mode.endswith("dies"):
    os.kill(worker.pid, 9)
    try:
      for _ in range(1000): next(batches)
    except Exception as error:
      print(type(error).__name__, error, flush=True)
  if mode == "closed":
    batches.close()
  sys.stdin.read()

if __name__ == "__main__":
  main(sys.argv[1])
"""


def _run_dying(tmp_path: pathlib.Path, mode: str) -> subprocess.Popen[str]:
  script = tmp_path / "dying.py"
  script.write_text(_DYING)
  return subprocess.Popen(
    [sys.executable, str(script), mode],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )


@pytest.mark.parametrize(
  "mode", ["worker dies", "worker of large batches dies"]
)
def test_a_dead_worker_is_reported(tmp_path: pathlib.Path, mode: str) -> None:
  """A worker killed while sending must not leave half of a message."""
  with _run_dying(tmp_path, mode) as process:
    out, err = process.communicate("", timeout=300)
  assert "UserError a process that prepares data died" in out, err
  assert "exit code -9" in out
  assert "--config.data.num_workers" in out


def test_nothing_is_left_behind(tmp_path: pathlib.Path) -> None:
  with _run_dying(tmp_path, "closed") as process:
    out, err = process.communicate("", timeout=300)
  assert process.returncode == 0
  assert err == ""
  _, *names = out.split()
  assert names
  assert not any(map(_is_segment, names))


def test_workers_outlive_signals_but_not_their_parent(
  tmp_path: pathlib.Path,
) -> None:
  with _run_dying(tmp_path, "") as process:
    assert process.stdout is not None
    first, *names = process.stdout.readline().split()
    worker = int(first)
    assert all(map(_is_segment, names)) == pathlib.Path("/dev/shm").is_dir()
    for number in (signal.SIGINT, signal.SIGTERM):
      os.kill(worker, number)
    time.sleep(0.5)
    os.kill(worker, 0)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (
      _alive(worker) or any(map(_is_segment, names))
    ):
      time.sleep(0.1)
    assert not _alive(worker)
    assert not any(map(_is_segment, names))


def _is_segment(name: str) -> bool:
  return (pathlib.Path("/dev/shm") / name).exists()


def _alive(pid: int) -> bool:
  try:
    status = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    return False
  return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_leftovers_of_an_abrupt_end_are_removed_in_silence():
  program = """
import multiprocessing.shared_memory, os, sys
from narvl_jax.data.batches.workers import quiet_cleanup
quiet_cleanup()
memory = multiprocessing.shared_memory.SharedMemory(create=True, size=64)
print(memory.name, flush=True)
os._exit(0)
"""
  # The tracker keeps the stream until it has cleaned up.
  result = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stderr == ""
  assert not pathlib.Path("/dev/shm", result.stdout.strip()).exists()
