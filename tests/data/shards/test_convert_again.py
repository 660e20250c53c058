"""Stopped conversions resume, and reject other settings and files."""

import json
import os
import pathlib
import signal
import subprocess
import time
from typing import Any

import pytest

from narvl_jax.data.shards import folder as conversion_folder
from narvl_jax.data.shards import manifest
from narvl_jax.errors import UserError
from tests.data.converting import (
  COMMAND,
  SHAPES,
  convert,
  run,
  same,
  write_jsonl,
)


def test_killed_conversion_resumes(tmp_path: pathlib.Path) -> None:
  options = [*SHAPES, "--max_examples=900", "--shards=30", "--num_workers=2"]
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  assert run(*options, f"--to={whole}").returncode == 0
  process = subprocess.Popen(
    [*COMMAND, *options, f"--to={killed}"], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout is not None
  for _ in range(2):
    assert "records" in process.stdout.readline()
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert not (killed / "manifest.json").exists()
  done = len(list((killed / ".convert").glob("0*.json")))
  assert 2 <= done < 30
  stamps = {p.name: p.stat().st_mtime_ns for p in killed.glob("*.array_record")}
  result = run(*options, f"--to={killed}")
  assert result.returncode == 0, result.stderr
  kept = int(result.stdout.split(" of 30 shards are there already")[0])
  assert kept >= done
  now = {p.name: p.stat().st_mtime_ns for p in killed.glob("*.array_record")}
  assert sum(now[name] == stamps[name] for name in stamps) >= done
  assert same(whole, killed)


def test_workers_end_with_a_killed_command(tmp_path: pathlib.Path) -> None:
  options = [*SHAPES, "--max_examples=40000", "--shards=40", "--num_workers=1"]
  process = subprocess.Popen(
    [*COMMAND, *options, f"--to={tmp_path / 'out'}"],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  process.stdout.readline()
  # The worker has the pipe as well: it ends when all processes have ended.
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  process.stdout.read()
  process.stdout.close()
  assert not (tmp_path / "out" / "manifest.json").exists()


def test_interrupted_command_prints_how_to_resume(
  tmp_path: pathlib.Path,
) -> None:
  # A shard takes longer than the test waits.
  options = [*SHAPES, "--max_examples=4000", "--shards=2", "--num_workers=2"]
  process = subprocess.Popen(
    # A test run in the background may ignore it.
    [
      *("/usr/bin/env", "--default-signal=INT"),
      *(*COMMAND, *options, f"--to={tmp_path / 'out'}"),
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  while not list((tmp_path / "out").glob(".*.tmp")):
    time.sleep(0.05)
    assert process.poll() is None
  os.killpg(process.pid, signal.SIGINT)
  output, error = process.communicate()
  assert process.returncode == 130
  assert (output, error) == ("", "stopped; the same command continues\n")


def _interrupted(folder: pathlib.Path, after: int = 2, **options: Any) -> None:
  """Stops a conversion after some shards."""

  class StopError(Exception):
    pass

  lines: list[str] = []

  def log(line: str) -> None:
    lines.append(line)
    if len(lines) == after:
      raise StopError

  with pytest.raises(StopError):
    convert(folder, log=log, **options)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "note", "none"])
def test_shards_that_are_kept_are_checked(
  tmp_path: pathlib.Path, damage: str
) -> None:
  convert(tmp_path / "whole", shards=4)
  folder = tmp_path / "part"
  _interrupted(folder, shards=4)
  path = folder / "grounding-test-00000-of-00004.array_record"
  if damage == "flip":
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
  elif damage == "cut":
    path.write_bytes(path.read_bytes()[:-1])
  elif damage == "remove":
    path.unlink()
  elif damage == "note":
    (folder / ".convert" / "00000.json").write_text("{")
  left = folder / ".convert" / "left.123.tmp"
  left.write_text("half")
  lines: list[str] = []

  def log(line: str) -> None:
    assert not left.exists()
    lines.append(line)

  convert(folder, shards=4, log=log)
  kept = 2 if damage == "none" else 1
  assert lines[0] == f"{kept} of 4 shards are there already"
  assert len(lines) == 5 - kept
  assert same(tmp_path / "whole", folder)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"shards": 3}, "was begun with shards=4, this command has 3"),
    ({"task": "vqa", "name": "grounding-test"}, "begun with task='grounding'"),
    ({"image_size": 64}, "begun with image.encoding='original'"),
    ({"limit": 11}, "begun with source.records=12, this command has 11"),
    (
      {"options": {"image_size": 64}},
      "begun without source.options.image_size, this command has 64",
    ),
  ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_do_not_mix(
  tmp_path: pathlib.Path, change: dict[str, Any], message: str, finished: bool
) -> None:
  if finished:
    convert(tmp_path, shards=4)
  else:
    _interrupted(tmp_path, shards=4)
  before = {p.name: p.read_bytes() for p in tmp_path.glob("*.array_record")}
  with pytest.raises(UserError, match=message):
    convert(tmp_path, **{"shards": 4, **change})
  after = {p.name: p.read_bytes() for p in tmp_path.glob("*.array_record")}
  assert after == before


def test_a_changed_source_is_noticed(tmp_path: pathlib.Path) -> None:
  path = write_jsonl(tmp_path, 8)
  folder = tmp_path / "out"
  _interrupted(folder, spec=str(path), limit=0, shards=4)
  rows = path.read_text()
  path.write_text(rows.replace("no 7", "no X"))
  os.utime(path, ns=(0, 0))
  with pytest.raises(UserError, match="the source changed since"):
    convert(folder, str(path), limit=0, shards=4)


def test_a_source_of_the_same_size_and_time_is_noticed(
  tmp_path: pathlib.Path,
) -> None:
  path = write_jsonl(tmp_path, 8)
  folder = tmp_path / "out"
  _interrupted(folder, spec=str(path), limit=0, shards=4)
  status = path.stat()
  rows = path.read_text()
  path.write_text(rows.replace("no 7", "no X"))
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
  with pytest.raises(UserError, match="the source changed since"):
    convert(folder, str(path), limit=0, shards=4)
  # A conversion that was begun before contents were compared continues.
  path.write_text(rows)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
  settings = folder / ".convert" / "settings.json"
  old = json.loads(settings.read_text())
  mark = old["source"]["fingerprint"]
  old["source"]["fingerprint"] = mark.split(":")[0]
  settings.write_text(json.dumps(old))
  assert convert(folder, str(path), limit=0, shards=4).records == 8


def test_only_one_conversion_at_a_time(tmp_path: pathlib.Path) -> None:
  def log(line: str) -> None:
    del line
    with pytest.raises(UserError, match="another conversion is writing"):
      convert(tmp_path, shards=2)

  convert(tmp_path, shards=2, log=log)
  assert manifest.verify(tmp_path) == []


def test_unknown_shards_are_not_overwritten(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "grounding-test-00000-of-00001.array_record"
  path.write_text("mine")
  with pytest.raises(UserError, match="of unknown origin; set --to"):
    convert(tmp_path)
  assert path.read_text() == "mine"


def test_only_differences_are_named():
  had = {
    "source": {
      "fingerprint": "",
      "options": {"a": 1, "b": [2]},
      "decoding": {"x": 1},
    }
  }
  wanted = {
    "source": {"fingerprint": "", "options": {"a": 1, "b": [3]}, "teacher": "t"}
  }
  with pytest.raises(
    UserError,
    match=r'"f" was begun with source\.options\.b=\[2\], this command has \[3\]'
    r" \(other differences: source\.teacher, source\.decoding\.x\); set --to",
  ):
    conversion_folder.check_settings(pathlib.Path("f"), had, wanted)
  with pytest.raises(
    UserError, match=r"begun without source\.teacher, this command has 't';"
  ):
    conversion_folder.check_settings(
      pathlib.Path("f"),
      {"source": {"fingerprint": ""}},
      {"source": {"fingerprint": "", "teacher": "t"}},
    )
  with pytest.raises(
    UserError, match=r"begun with source\.decoding\.x=1, this command has none;"
  ):
    conversion_folder.check_settings(
      pathlib.Path("f"),
      {"source": {"fingerprint": "", "decoding": {"x": 1}}},
      {"source": {"fingerprint": ""}},
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wrong_task_leaves_nothing(
  tmp_path: pathlib.Path, num_workers: int
) -> None:
  path = str(write_jsonl(tmp_path, 8))
  folder = tmp_path / "new" / "out"
  with pytest.raises(UserError):
    convert(folder, path, task="vqa", shards=4, num_workers=num_workers)
  assert not folder.exists()
  # What was there before stays.
  folder.mkdir(parents=True)
  (folder / "notes.txt").write_text("mine")
  with pytest.raises(UserError):
    convert(folder, path, task="vqa", shards=4)
  assert [x.name for x in folder.iterdir()] == ["notes.txt"]
  convert(folder, path, limit=0, shards=4)
