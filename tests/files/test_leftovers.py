"""Temporary files of killed processes are removed, those of live ones kept."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from narvl_jax.checkpointing.orbax_manager import DELETED
from narvl_jax.files import disk, leftovers
from narvl_jax.reliability.guard import Guard
from narvl_jax.reliability.ledger import Ledger
from tests.support.disks import files

# Writes a file until it is killed.
_WRITER = """
import pathlib, sys, time
from narvl_jax.files.disk import replacing
with replacing(pathlib.Path(sys.argv[1])) as part:
  part.write_text("half")
  print("writing", flush=True)
  time.sleep(600)
"""


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
  """A process searches each folder once; here each test does."""
  monkeypatch.setattr(leftovers, "_searched", set())


def _writer(path: pathlib.Path) -> subprocess.Popen:
  process = subprocess.Popen(
    [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE
  )
  assert process.stdout is not None
  assert process.stdout.readline() == b"writing\n"
  return process


def _kill(process: subprocess.Popen) -> None:
  process.send_signal(signal.SIGKILL)
  process.communicate()


def test_a_killed_writer_and_a_live_one(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  killed, live = _writer(path), _writer(path)
  try:
    _kill(killed)
    assert len(files(tmp_path)) == 2
    disk.write_text(path, "whole")
    left = [x for x in files(tmp_path) if f"-{live.pid}-" in x]
    assert files(tmp_path) == {"results.json", *left}
    assert len(left) == 1
    # The start of a run also searches below the folder.
    leftovers.remove_below(tmp_path.parent)
    assert files(tmp_path) == {"results.json", *left}
  finally:
    _kill(live)
  leftovers.remove_below(tmp_path.parent)
  assert files(tmp_path) == {"results.json"}


def _age(path: pathlib.Path, hours: float) -> None:
  moment = time.time() - 3600 * hours
  os.utime(path, (moment, moment))


@pytest.mark.parametrize(
  "name",
  [
    # Files of another machine, and of earlier versions.
    ".test.jsonl.0123abcd-99-1234-0.tmp",
    ".test.jsonl.4711.tmp",
    "tokenizer.json.4711.part",
    "rows.tsv.rows.idx.x_3a9z0q.tmp",
    f".lock.json.{'0af1' * 8}",
  ],
)
def test_age_decides_where_the_process_cannot_be_seen(tmp_path, name):
  path = tmp_path / "predictions" / name
  path.parent.mkdir()
  path.write_text("half")
  leftovers.remove_below(tmp_path)
  assert path.exists()
  _age(path, 25)
  leftovers.remove_below(tmp_path)
  assert not path.exists()


def test_a_folder_is_as_old_as_its_newest_file(tmp_path):
  part = tmp_path / ".run.0123abcd-99-1234-0.tmp"
  (part / "checkpoints").mkdir(parents=True)
  (part / "checkpoints" / "array").write_text("")
  for path in (part / "checkpoints", part):
    _age(path, 25)
  leftovers.remove_below(tmp_path)
  assert part.exists()
  _age(part / "checkpoints" / "array", 25)
  for path in (part / "checkpoints", part):
    _age(path, 25)
  leftovers.remove_below(tmp_path)
  assert not part.exists()


def test_files_of_the_user_are_not_touched(tmp_path):
  names = ["data.2024.tmp", "x.part", ".hidden.tmp", "a.rows.idx", "notes.tmp"]
  for name in names:
    (tmp_path / name).write_text("mine")
    _age(tmp_path / name, 1000)
  disk.write_text(tmp_path / "rows.idx", "index")
  assert files(tmp_path) == {*names, "rows.idx"}


def test_without_proc_age_decides(tmp_path, monkeypatch):
  monkeypatch.setattr(leftovers, "machine", lambda: "")
  path = leftovers.temporary_path(tmp_path / "x")
  path.write_text("half")
  leftovers.remove_below(tmp_path)
  assert path.exists()


def test_names_are_never_shared_nor_too_long(tmp_path):
  path = tmp_path / ("é" * 127)
  names = {leftovers.temporary_path(path).name for _ in range(3)}
  assert len(names) == 3
  disk.write_text(path, "x")
  assert files(tmp_path) == {path.name}


def test_a_start_of_a_run_removes_them(tmp_path):
  writer = _writer(tmp_path / "predictions" / "test.jsonl")
  _kill(writer)
  assert len(files(tmp_path)) == 1
  guard = Guard(tmp_path, Ledger())
  guard.lock_folder(print)
  assert files(tmp_path) == {"lock.json"}
  guard.end(0, "done")


def test_checkpoints_that_were_being_deleted(tmp_path):
  from narvl_jax.checkpointing.writing import Checkpoints

  deleted = tmp_path / "checkpoints" / DELETED / "3"
  deleted.mkdir(parents=True)
  (deleted / "array").write_text("old")
  # Readers change nothing.
  with Checkpoints(tmp_path):
    assert deleted.exists()
  with Checkpoints(tmp_path, keep_last=1):
    assert not deleted.exists()


def test_devices_and_links_are_not_replaced(tmp_path):
  disk.write_text(pathlib.Path("/dev/null"), "x")
  assert not pathlib.Path("/dev/null").is_file()
  (tmp_path / "large").mkdir()
  real, link = tmp_path / "large" / "real", tmp_path / "link"
  real.write_text("old")
  link.symlink_to(real)
  disk.write_text(link, "new")
  assert link.is_symlink()
  assert real.read_text() == "new"


def test_a_renamed_folder_is_not_created_again(tmp_path):
  run = tmp_path / "run"
  run.mkdir()

  def write() -> None:
    with disk.atomically(run / "file") as temporary:
      run.rename(tmp_path / "elsewhere")
      temporary.write_text("x")

  with pytest.raises(FileNotFoundError):
    write()
  assert not run.exists()
