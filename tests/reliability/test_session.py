"""Output of a host, and the end of a run on several hosts."""

import contextlib
import errno
import io
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from narvl_jax.errors import UserError
from narvl_jax.reliability import session as hosts
from narvl_jax.terminal.text import show

# Everything that prints, in the way of each.
_SPEAK = """
import os, pathlib, sys, warnings
from absl import logging
from narvl_jax.terminal.text import show
from narvl_jax.reliability import session as hosts
logging.use_absl_handler()
folder = sys.argv[2] and pathlib.Path(sys.argv[2])
with hosts._output(int(sys.argv[1]), folder or None) as (terminal, log):
  print("python out")
  print("python err", file=sys.stderr)
  logging.warning("logged")
  os.write(1, b"below out\\n")
  os.write(2, b"below err\\n")
  print("loud", file=terminal)
print("after out")
os.write(2, b"after err\\n")
logging.warning("after log")
"""
_ALL = ("python out", "python err", "logged", "below out", "loud")


def _speak(host: int, folder: pathlib.Path | str) -> tuple[str, str]:
  command = [sys.executable, "-c", _SPEAK, str(host), str(folder)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  # Also at its end, where Python finalises what is left.
  assert "Traceback" not in done.stderr
  assert "Exception ignored" not in done.stderr
  return done.stdout, done.stderr


@pytest.mark.parametrize(("host", "shows"), [(0, True), (1, False)])
def test_only_the_first_host_shows_what_it_does(tmp_path, host, shows):
  """By lines, as they also go into the log."""
  code = """
import sys, pathlib, time
from narvl_jax.terminal import progress
from narvl_jax.reliability import session as hosts
progress._DRAW_SECONDS, progress._GAPS = 0.01, (0.01, 0.01)
with hosts._output(int(sys.argv[1]), pathlib.Path(sys.argv[2])):
  with progress.doing("working"):
    time.sleep(0.5)
"""
  command = [sys.executable, "-c", code, str(host), str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  log = (tmp_path / f"host_{host:03d}.log").read_text()
  line = "progress: working: 0s"
  assert (line in log, line in done.stderr) == (shows, shows)
  assert done.stdout == ""


def test_the_first_host_prints_and_keeps_a_log(tmp_path):
  out, err = _speak(0, tmp_path)
  assert out == "python out\nafter out\n"
  words = ("python err", "logged", "below err", "loud", "after err")
  assert [word in err for word in words] == [True] * 5
  assert err.count("loud") == 1
  assert "after log" in err
  log = (tmp_path / "host_000.log").read_text()
  assert [word in log for word in _ALL] == [True] * 5
  assert "after" not in log


def test_other_hosts_print_into_their_logs(tmp_path):
  out, err = _speak(12, tmp_path)
  assert out == "after out\n"
  assert err.startswith("loud\nafter err\n")
  assert "after log" in err
  log = (tmp_path / "host_012.log").read_text()
  assert [word in log for word in (*_ALL, "below err")] == [True] * 6
  # A later start appends to the same file.
  _speak(12, tmp_path)
  assert (tmp_path / "host_012.log").read_text().startswith(log)


def test_without_logs_other_hosts_are_silent_but_for_errors():
  out, err = _speak(1, "")
  assert out == "after out\n"
  assert "python err" in err
  assert "below out" not in err


def test_a_log_that_cannot_be_written():
  # A place in which no folder can be created.
  folder = pathlib.Path("/proc/logs")
  with (
    pytest.raises(UserError, match=r"the log of host 3 .*another --workdir"),
    hosts._output(3, folder),
  ):
    pass


def test_a_log_on_a_disk_that_gets_full():
  class Full(io.StringIO):
    def flush(self) -> None:
      raise OSError(errno.ENOSPC, "No space left on device")

  terminal = io.StringIO()
  tee = hosts._Tee(terminal, Full())
  for _ in range(2):
    print("words", file=tee, flush=True)
  assert terminal.getvalue() == (
    "words\nnote: no more log: No space left on device\nwords\n"
  )


def _closed() -> io.StringIO:
  class Closed(io.StringIO):
    def flush(self) -> None:
      raise BrokenPipeError(errno.EPIPE, "Broken pipe")

  return Closed()


def test_a_terminal_that_is_closed():
  log = io.StringIO()
  tee = hosts._Tee(_closed(), log)
  for _ in range(2):
    print("words", file=tee, flush=True)
  assert log.getvalue() == (
    "words\nnote: no more terminal: Broken pipe\nwords\n"
  )


def test_a_process_continues_without_its_terminal(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", _SPEAK, "0", str(tmp_path)],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )
  assert process.stdout is not None
  process.stdout.close()
  assert process.wait() == 0
  log = (tmp_path / "host_000.log").read_text()
  assert "python out\nnote: no more terminal: Broken pipe\n" in log
  assert [word in log for word in _ALL] == [True] * 5


def test_nobody_is_left_to_write_to():
  with open(os.devnull, "w") as nothing:
    tee = hosts._Tee(_closed(), nothing)
    for _ in range(2):
      with pytest.raises(BrokenPipeError):
        print("words", file=tee, flush=True)
  tee = hosts._Tee(_closed(), _closed())
  with pytest.raises(BrokenPipeError):
    print("words", file=tee, flush=True)


def test_a_single_process_is_left_alone(tmp_path):
  streams = sys.stdout, sys.stderr
  kept = os.fstat(1)
  with hosts.together(
    None, tmp_path, lambda: {}, lambda _: (1, ""), print
  ) as notices:
    assert notices is None
    assert (sys.stdout, sys.stderr) == streams
    assert os.fstat(1) == kept
  assert not list(tmp_path.iterdir())


def test_a_terminal_keeps_its_encoding() -> None:
  reading, writing = os.pipe()
  terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  with contextlib.ExitStack() as stack:
    copy = hosts._duplicate(stack, writing, terminal)
    show("größe", file=copy)
    print("\ud83d", file=copy)
  os.close(writing)
  with open(reading, "rb") as file:
    assert file.read() == b"gr\\xf6\\xdfe\n\\ud83d\n"


# A run of one process that prints before and after its terminal is closed.
_OUTLIVE = """
import pathlib, sys
from absl import logging
from narvl_jax.terminal.text import show
from narvl_jax.reliability import session as hosts
logging.use_absl_handler()
with hosts.outliving_terminal(pathlib.Path(sys.argv[1])):
  show("first")
  sys.stdin.readline()
  for word in ("second", "third"):
    show(word)
  logging.warning("logged")
  print("wrong", file=sys.stderr)
show("last")
"""


def _outlive(
  folder: pathlib.Path, stdout: Any, stderr: Any = subprocess.PIPE
) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", _OUTLIVE, str(folder)],
    stdin=subprocess.PIPE,
    stdout=stdout,
    stderr=stderr,
    text=True,
  )


def test_a_single_process_outlives_the_reader_of_its_output(tmp_path):
  process = _outlive(tmp_path / "logs", subprocess.PIPE)
  assert process.stdout is not None
  assert process.stderr is not None
  assert process.stdin is not None
  assert process.stdout.readline() == "first\n"
  assert not (tmp_path / "logs").exists()
  process.stdout.close()
  process.stdin.write("\n")
  process.stdin.close()
  errors = process.stderr.read()
  assert process.wait() == 0
  process.stderr.close()
  path = tmp_path / "logs" / "host_000.log"
  note, *_, logged, wrong = errors.splitlines()
  assert note == (
    "note: stdout cannot be written (Broken pipe); the run continues, and"
    f" prints into {path}"
  )
  assert logged.endswith("logged")
  assert wrong == "wrong"
  head, *lines = path.read_text().splitlines()
  assert head.startswith("--- ")
  assert lines == ["note: no more terminal: Broken pipe", "second", "third"]


def test_a_single_process_outlives_a_full_disk(tmp_path):
  with open("/dev/full", "w") as full:
    process = _outlive(tmp_path, full, full)
    process.communicate("\n")
  assert process.returncode == 0
  lines = (tmp_path / "host_000.log").read_text().splitlines()
  note = "note: no more terminal: No space left on device"
  assert lines[1:5] == [note, "first", "second", "third"]
  assert lines[5] == note
  assert lines[-2].endswith("logged")
  assert lines[-1] == "wrong"


def test_without_a_log_a_single_process_ends(tmp_path):
  (tmp_path / "file").write_text("")
  tee = hosts._Tee(
    _closed(),
    open_log=lambda: hosts._open_log(0, tmp_path / "file" / "logs").__enter__(),
  )
  with pytest.raises(BrokenPipeError):
    print("words", file=tee, flush=True)
  streams = sys.stdout, sys.stderr
  with hosts.outliving_terminal(None):
    assert (sys.stdout, sys.stderr) == streams
