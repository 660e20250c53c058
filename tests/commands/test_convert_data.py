"""The command that writes shards, what is in them, and its mistakes."""

import dataclasses
import io
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images
from narvl_jax.data.shards import manifest
from narvl_jax.data.shards import writer as shard_writer
from narvl_jax.data.sources import load_source
from narvl_jax.errors import UserError
from tests.data.converting import (
  SHAPES,
  convert,
  run,
  same,
  write_jsonl,
)


def test_the_command(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "out"
  arguments = [*SHAPES, "--max_examples=9", "--shard_size=4", f"--to={folder}"]
  result = run(*arguments, "--num_workers=2", "--verify")
  assert (result.returncode, result.stderr) == (0, "")
  assert "9 records of grounding, split test, in 3 shards" in result.stdout
  assert "every shard matches the manifest" in result.stdout
  assert sorted(path.name for path in folder.iterdir()) == [
    *(f"grounding-test-{k:05d}-of-00003.array_record" for k in range(3)),
    "manifest.json",
  ]
  result = run(*arguments)
  assert result.returncode == 0
  assert f"{folder} is complete: 9 records" in result.stdout
  # Shards are checked: one that was damaged since is reported.
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


def test_manifest_describes_the_shards(tmp_path: pathlib.Path) -> None:
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


def test_boxes_are_resized_with_their_pictures(
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


def test_bad_records_are_skipped_and_reported(tmp_path: pathlib.Path) -> None:
  path = write_jsonl(tmp_path, 20, bad=(3, 11))
  folder = tmp_path / "out"
  arguments = [path, "--task=grounding", f"--to={folder}", "--shards=4"]
  result = run(*arguments, "--max_bad_fraction=0.1", "--num_workers=0")
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
  with pytest.raises(UserError, match="--max_bad_fraction=nan is not in"):
    convert(folder, str(path), max_bad_fraction=math.nan, **options)
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


# No file may have more than 50 blocks of 1024 bytes.
_SMALL_FILES = ("bash", "-c", 'ulimit -f 50; exec "$@"', "bash")


def test_a_full_disk_is_one_line(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "out"
  arguments = [*SHAPES, "--max_examples=100", "--shards=1", f"--to={folder}"]
  for workers in (0, 1):
    result = run(*arguments, f"--num_workers={workers}", before=_SMALL_FILES)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f'error: cannot write "{folder}/grounding-test')
    assert "File too large; make room, or set --to" in line
    assert list(folder.glob("*.array_record")) == []
    assert list(folder.glob(".*.tmp")) == []
  assert run(*arguments).returncode == 0


def test_written_values_are_read_back(
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
    ([*SHAPES, "--to=OUT", "--options=x"], "--options='x' is not JSON"),
    ([*SHAPES, "--to=OUT", "--options=[]"], "must be a JSON object"),
    ([*SHAPES, "--to=OUT", '--options={"size": 3}'], 'option "size"'),
    (
      [*SHAPES, "--to=OUT", "--max_examples=3", "--shards=4"],
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
