import dataclasses
import filecmp
import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data import conversion, images, manifest, shard_writer
from narvl_jax.data.example import Record
from narvl_jax.data.sources import load_source
from narvl_jax.errors import UserError

COMMAND = [sys.executable, "-m", "narvl_jax.data.convert"]
SHAPES = ["shapes", "--task=grounding", "--split=test"]


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [*COMMAND, *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
    **options,
  )


def convert(
  folder: pathlib.Path, spec: str = "shapes", **options: Any
) -> manifest.Manifest:
  """Converts in this process unless `num_workers` is given."""
  convert_options = {
    key: options.pop(key)
    for key in ("num_workers", "max_bad_fraction", "tell")
    if key in options
  }
  options = {"task": "grounding", "split": "test", "limit": 12, **options}
  job, origin = conversion.plan(spec, str(folder), **options)
  convert_options.setdefault("tell", lambda line: None)
  return conversion.convert(job, origin, **convert_options)


def same(left: pathlib.Path, right: pathlib.Path) -> bool:
  names = sorted(path.name for path in left.iterdir())
  assert names == sorted(path.name for path in right.iterdir())
  _, differing, errors = filecmp.cmpfiles(left, right, names, shallow=False)
  return not differing and not errors


def write_jsonl(
  folder: pathlib.Path, count: int, bad: tuple[int, ...] = ()
) -> pathlib.Path:
  """Writes pictures of 60 x 40 pixels with a box each; bad ones have none."""
  rows = []
  for number in range(count):
    name = f"{number}.jpg"
    pixels = np.full((40, 60, 3), 3 * number, np.uint8)
    Image.fromarray(pixels).save(folder / name)
    box = [6, 4, 30, 20] if number not in bad else [6, 4, 6, 20]
    rows.append({"image": name, "prompt": f"no {number}", "target": box})
  path = folder / "own.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_the_command(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "out"
  arguments = [*SHAPES, "--limit=9", "--shard_size=4", f"--to={folder}"]
  result = run(*arguments, "--workers=2", "--verify")
  assert (result.returncode, result.stderr) == (0, "")
  assert "9 records of grounding, split test, in 3 shards" in result.stdout
  assert "every shard is as the manifest says" in result.stdout
  assert sorted(path.name for path in folder.iterdir()) == [
    *(f"grounding-test-{k:05d}-of-00003.array_record" for k in range(3)),
    "manifest.json",
  ]
  result = run(*arguments)
  assert result.returncode == 0
  assert f"{folder} is complete: 9 records" in result.stdout
  # Not without a look: a shard that was damaged since is told.
  path = folder / "grounding-test-00001-of-00003.array_record"
  data = bytearray(path.read_bytes())
  data[100] ^= 1
  path.write_bytes(data)
  result = run(*arguments)
  assert result.returncode == 2
  assert "was complete and is damaged: grounding-test-00001" in result.stderr
  path.unlink()
  result = run(*arguments)
  assert (result.returncode, result.stdout) == (2, "")
  assert "00001-of-00003.array_record: missing; set --to" in result.stderr


def test_manifest_says_what_is_there(tmp_path: pathlib.Path) -> None:
  done = convert(tmp_path, shards=5)
  assert manifest.read_manifest(tmp_path) == done
  assert (done.records, done.task, done.split) == (12, "grounding", "test")
  assert [shard.records for shard in done.shards] == [2, 2, 3, 2, 3]
  for shard in done.shards:
    path = tmp_path / shard.file
    assert shard.bytes == path.stat().st_size
    assert shard.sha256 == manifest.sha256_of(path)
  assert done.image == {"encoding": "original"}
  assert done.source == {
    "spec": "shapes",
    "options": {},
    "records": 12,
    "fingerprint": "",
  }


def test_workers_do_not_change_a_byte(tmp_path: pathlib.Path) -> None:
  for workers in (0, 1, 2):
    convert(
      tmp_path / str(workers),
      shards=4,
      num_workers=workers,
      image_size=32,
    )
  assert same(tmp_path / "0", tmp_path / "1")
  assert same(tmp_path / "0", tmp_path / "2")


def test_original_bytes_are_kept(tmp_path: pathlib.Path) -> None:
  path = write_jsonl(tmp_path, 5)
  convert(tmp_path / "out", str(path), limit=0)
  original = load_source(
    "jsonl", task="grounding", split="test", path=str(path)
  )
  source = load_source(
    "array_record", task="grounding", split="test", path=str(tmp_path / "out")
  )
  assert list(source) == list(original)
  assert len(source) == 5


def test_resized_pictures_take_their_boxes_along(
  tmp_path: pathlib.Path,
) -> None:
  path = write_jsonl(tmp_path, 3)
  done = convert(
    tmp_path / "out", str(path), limit=0, image_size=120, quality=90
  )
  assert done.image == {"encoding": "jpeg", "size": 120, "quality": 90}
  source = load_source(
    "array_record", task="grounding", split="test", path=str(tmp_path / "out")
  )
  for number, record in enumerate(source):
    assert record.box == (12.0, 12.0, 60.0, 60.0)
    assert isinstance(record.image, bytes)
    with Image.open(io.BytesIO(record.image)) as picture:
      assert picture.size == (120, 120)
      assert picture.format == "JPEG"
    original = (tmp_path / f"{number}.jpg").read_bytes()
    expected = images.prepare_image(original, (120, 120)).astype(int)
    stored = images.prepare_image(record.image, (120, 120)).astype(int)
    assert abs(stored - expected).max() <= 3


def test_quality_is_used(tmp_path: pathlib.Path) -> None:
  sizes = [
    sum(
      len(record.image)
      for record in _converted(tmp_path / str(q), image_size=64, quality=q)
    )
    for q in (20, 95)
  ]
  assert sizes[0] < 0.6 * sizes[1]


def _converted(folder: pathlib.Path, **options: Any) -> Any:
  convert(folder, **options)
  return load_source("array_record", task="", split="", path=str(folder))


def test_killed_conversion_goes_on(tmp_path: pathlib.Path) -> None:
  options = [*SHAPES, "--limit=900", "--shards=30", "--workers=2"]
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
  options = [*SHAPES, "--limit=40000", "--shards=40", "--workers=1"]
  process = subprocess.Popen(
    [*COMMAND, *options, f"--to={tmp_path / 'out'}"],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  process.stdout.readline()
  # The worker has the pipe as well: it is at its end when all are gone.
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  process.stdout.read()
  process.stdout.close()
  assert not (tmp_path / "out" / "manifest.json").exists()


def test_interrupted_command_says_how_to_go_on(tmp_path: pathlib.Path) -> None:
  # A shard takes longer than the test waits.
  options = [*SHAPES, "--limit=4000", "--shards=2", "--workers=2"]
  process = subprocess.Popen(
    [*COMMAND, *options, f"--to={tmp_path / 'out'}"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
    # A test run in the background may ignore it.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  progress = tmp_path / "out" / ".convert"
  while not list(progress.glob("*.tmp")):
    time.sleep(0.05)
    assert process.poll() is None
  os.killpg(process.pid, signal.SIGINT)
  output, error = process.communicate()
  assert process.returncode == 130
  assert (output, error) == ("", "stopped; the same command continues\n")


def _interrupted(folder: pathlib.Path, after: int = 2, **options: Any) -> None:
  """Leaves a conversion behind of which some shards are done."""

  class StopError(Exception):
    pass

  lines: list[str] = []

  def tell(line: str) -> None:
    lines.append(line)
    if len(lines) == after:
      raise StopError

  with pytest.raises(StopError):
    convert(folder, tell=tell, **options)


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

  def tell(line: str) -> None:
    assert not left.exists()
    lines.append(line)

  convert(folder, shards=4, tell=tell)
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
      "begun with source.options={}, this command has {'image_size': 64}",
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


def test_only_one_conversion_at_a_time(tmp_path: pathlib.Path) -> None:
  def tell(line: str) -> None:
    del line
    with pytest.raises(UserError, match="another conversion is writing"):
      convert(tmp_path, shards=2)

  convert(tmp_path, shards=2, tell=tell)
  assert manifest.verify(tmp_path) == []


def test_unknown_shards_are_not_overwritten(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "grounding-test-00000-of-00001.array_record"
  path.write_text("mine")
  with pytest.raises(UserError, match="of unknown origin; set --to"):
    convert(tmp_path)
  assert path.read_text() == "mine"


def test_bad_records_are_left_out_and_told(tmp_path: pathlib.Path) -> None:
  path = write_jsonl(tmp_path, 20, bad=(3, 11))
  folder = tmp_path / "out"
  arguments = [path, "--task=grounding", f"--to={folder}", "--shards=4"]
  result = run(*arguments, "--max_bad_fraction=0.1", "--workers=0")
  assert result.returncode == 0
  assert "18 records of grounding, split train, in 4 shards" in result.stdout
  assert "2 bad" in result.stdout
  told = [line for line in result.stderr.splitlines() if "left out" in line]
  assert len(told) == 2
  assert "own.jsonl row 4 (?): the box [6, 4, 6, 20] has no area" in told[0]
  bad = manifest.read_manifest(folder).bad_records
  assert [b["index"] for b in bad] == [3, 11]
  assert bad[1]["place"].endswith("own.jsonl row 12")
  assert "has no area" in bad[1]["reason"]
  source = load_source("array_record", task="", split="", path=str(folder))
  assert [r.prompt for r in source] == [
    f"no {n}" for n in range(20) if n not in (3, 11)
  ]


def test_too_many_bad_records_stop(tmp_path: pathlib.Path) -> None:
  path = write_jsonl(tmp_path, 20, bad=(3, 11))
  folder = tmp_path / "out"
  message = r"2 of 20 records are bad, such as .*row 12.*--max_bad_fraction"
  options: Any = {"limit": 0, "shards": 4}
  with pytest.raises(UserError, match=message):
    convert(folder, str(path), max_bad_fraction=0.05, **options)
  assert not (folder / "manifest.json").exists()
  done = convert(folder, str(path), max_bad_fraction=0.1, **options)
  assert (done.records, len(done.bad_records)) == (18, 2)


def test_a_shard_may_lose_all_its_records(tmp_path: pathlib.Path) -> None:
  path = write_jsonl(tmp_path, 4, bad=(1,))
  folder = tmp_path / "out"
  convert(folder, str(path), limit=0, shards=4, max_bad_fraction=0.5)
  assert manifest.verify(folder) == []
  source = load_source("array_record", task="", split="", path=str(folder))
  assert [r.prompt for r in source] == ["no 0", "no 2", "no 3"]
  assert source.locate(1).endswith("00002-of-00004.array_record record 0")  # pyright: ignore


def test_a_full_disk_is_one_line(tmp_path: pathlib.Path) -> None:
  def limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

  folder = tmp_path / "out"
  arguments = [*SHAPES, "--limit=100", "--shards=1", f"--to={folder}"]
  for workers in (0, 1):
    result = run(*arguments, f"--workers={workers}", preexec_fn=limit)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f'error: cannot write "{folder}/grounding-test')
    assert "File too large; make room, or set --to" in line
    assert list(folder.glob("*.array_record")) == []
    assert list((folder / ".convert").glob("*.tmp")) == []
  assert run(*arguments).returncode == 0


def test_what_was_written_is_read_back(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(shard_writer, "_digest", lambda *_: (12, "other"))
  with pytest.raises(UserError, match="read back differs from what was"):
    convert(tmp_path)
  assert list(tmp_path.glob("*.array_record")) == []


def test_a_folder_that_cannot_be_made(tmp_path: pathlib.Path) -> None:
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
    convert(tmp_path / "file" / "out")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  convert(tmp_path / "out", shards=3)
  return tmp_path / "out"


def shard(folder: pathlib.Path, number: int) -> pathlib.Path:
  return folder / f"grounding-test-{number:05d}-of-00003.array_record"


def test_verify_finds_every_flipped_bit_of_a_sample(
  folder: pathlib.Path,
) -> None:
  path = shard(folder, 1)
  data = path.read_bytes()
  for place in np.linspace(0, len(data) - 1, 25).astype(int):
    damaged = bytearray(data)
    damaged[place] ^= 1 << (place % 8)
    path.write_bytes(damaged)
    (fault,) = manifest.verify(folder)
    assert fault.startswith(f"{path.name}: ")
  path.write_bytes(data)
  assert manifest.verify(folder) == []


def test_verify_names_each_fault(folder: pathlib.Path) -> None:
  shard(folder, 0).rename(folder / "x.array_record")
  path = shard(folder, 1)
  data = path.read_bytes()
  path.write_bytes(data[:-5])
  data = bytearray(shard(folder, 2).read_bytes())
  data[300] ^= 1
  shard(folder, 2).write_bytes(data)
  result = run(folder, "--verify")
  assert result.returncode == 1
  lines = result.stdout.splitlines()
  assert lines == [
    f"{shard(folder, 0).name}: missing; x.array_record has its data, rename it",
    f"{path.name}: truncated: 131,067 bytes of 131,072",
    f"{shard(folder, 2).name}: changed: its SHA-256 is not the manifest's",
    f"x.array_record: not in manifest.json, a copy of {shard(folder, 0).name}",
  ]
  assert result.stderr == ""


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "what to convert is missing"),
    (["shapes"], "--to is missing"),
    (["shapse", "--to=OUT"], 'Did you mean "shapes"'),
    (["shapes", "--to=OUT"], 'unknown task ""'),
    ([*SHAPES, "--to=OUT", "--options=x"], "--options='x' is no JSON"),
    ([*SHAPES, "--to=OUT", "--options=[]"], "must be a JSON object"),
    ([*SHAPES, "--to=OUT", '--options={"size": 3}'], 'option "size"'),
    (
      [*SHAPES, "--to=OUT", "--limit=3", "--shards=4"],
      "4 shards for 3 records are too many",
    ),
    ([*SHAPES, "--to=OUT", "--quality=101"], "101"),
    (["OUT", "--verify"], "has no manifest.json"),
  ],
)
def test_mistakes_are_explained(
  tmp_path: pathlib.Path, arguments: list[str], message: str
) -> None:
  out = tmp_path / "out"
  result = run(*(a.replace("OUT", str(out)) for a in arguments))
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert message in line
  assert not out.exists()


def test_a_record_is_left_as_it_is_without_a_size() -> None:
  job = shard_writer.Job("s", "vqa", "", {}, "f", "n", 1, 1)
  record = Record("i", "vqa", b"no picture at all")
  assert shard_writer._with_stored_image(record, job) is record
  sized = dataclasses.replace(job, image_size=32)
  with pytest.raises(UserError, match="in no known format"):
    shard_writer._with_stored_image(record, sized)
