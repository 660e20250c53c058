import concurrent.futures
import dataclasses
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
from typing import Any

import msgpack
import numpy as np
import pytest

from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images
from narvl_jax.data.shards import conversion, records
from narvl_jax.data.sources import load_source, locate, open_source
from narvl_jax.errors import UserError

NAME = "vqa-test-0000{}-of-00003.array_record"
FULL = Record(
  id="a/1",
  task="vqa",
  image=b"\xff\xd8 any bytes",
  prompt="what é?",
  answers={"two": 0.3, "one": 1.0},
  box=(0.1, 2.0, 1 / 3, 1e6),
  premise="p",
  objects=("tree", "car"),
  kind="count",
)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """Ten records of shapes in three shards."""
  target = tmp_path / "shards"
  job, origin = conversion.plan(
    "shapes", str(target), task="vqa", split="test", limit=10, shards=3
  )
  conversion.convert(job, origin, log=lambda line: None)
  return target


def opened(path: Any, task: str = "vqa", split: str = "test") -> Any:
  return load_source("array_record", task=task, split=split, path=path)


@pytest.mark.parametrize(
  "record",
  [
    FULL,
    Record("i", "caption", b"x"),
    dataclasses.replace(FULL, objects=(), answers={}, box=None),
    dataclasses.replace(FULL, box=(0.0, 0.0, 0.0, 0.0)),
  ],
)
def test_stored_form_keeps_every_field(record: Record) -> None:
  again = records.deserialize(records.serialize(record))
  assert again == record
  assert list(again.answers) == list(record.answers)
  assert (again.objects is None) == (record.objects is None)


def test_stored_form_is_the_documented_one() -> None:
  fields = msgpack.unpackb(records.serialize(FULL))
  assert fields == {
    "id": "a/1",
    "task": "vqa",
    "image": FULL.image,
    "prompt": "what é?",
    "answers": [["two", 0.3], ["one", 1.0]],
    "box": [0.1, 2.0, 1 / 3, 1e6],
    "premise": "p",
    "objects": ["tree", "car"],
    "kind": "count",
  }
  assert set(msgpack.unpackb(records.serialize(Record("i", "vqa", b"x")))) == {
    "id",
    "task",
    "image",
  }


def test_arrays_are_stored_as_png() -> None:
  pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
  record = dataclasses.replace(FULL, image=pixels)
  again = records.deserialize(records.serialize(record))
  assert isinstance(again.image, bytes)
  assert (images.prepare_image(again.image, (5, 7)) == pixels).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image": b""}, "the image is empty"),
    ({"image": np.zeros((2, 2), np.uint8)}, "must be uint8"),
    ({"prompt": object()}, "the record cannot be stored"),
  ],
)
def test_records_that_cannot_be_stored(
  change: dict[str, Any], message: str
) -> None:
  with pytest.raises(UserError, match=message):
    records.serialize(dataclasses.replace(FULL, **change))


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "the stored record is damaged"),
    (b"\xff\xfe", "the stored record is damaged"),
    (msgpack.packb({"id": "1", "task": "vqa"}), "damaged .KeyError: 'image'"),
    (msgpack.packb([1]), "the stored record is damaged"),
    (
      msgpack.packb({"id": "1", "task": "v", "image": b"x"}),
      'has the task "v"',
    ),
  ],
)
def test_damaged_forms(data: bytes, message: str) -> None:
  with pytest.raises(UserError, match=message):
    records.deserialize(data)


def test_records_are_those_of_the_source(folder: pathlib.Path) -> None:
  source = opened(str(folder))
  original = load_source("shapes", task="vqa", split="test")
  assert len(source) == 10
  for index, record in enumerate(source):
    expected = original[index]
    pixels = images.prepare_image(record.image, (48, 48))
    assert (pixels == expected.image).all()
    assert record == dataclasses.replace(expected, image=record.image)
  assert source[-1].id == source[9].id
  assert [r.id for r in source[2:5]] == [source[i].id for i in (2, 3, 4)]
  with pytest.raises(IndexError, match="no record 10 of 10"):
    source[10]


def test_places(folder: pathlib.Path) -> None:
  source = opened(str(folder))
  # 10 records on 3 shards: 3, 3, 4.
  places = [locate(source, i) for i in range(10)]
  assert places == [
    f"{folder / NAME.format(shard)} record {k}"
    for shard, count in enumerate((3, 3, 4))
    for k in range(count)
  ]


def test_folders_by_split_and_several(folder: pathlib.Path) -> None:
  ids = [r.id for r in opened(str(folder))]
  shutil.copytree(folder, folder.parent / "test")
  assert [r.id for r in opened(str(folder.parent / "{split}"))] == ids
  assert [r.id for r in opened({"test": str(folder)})] == ids
  assert [r.id for r in opened((str(folder), str(folder)))] == ids + ids
  assert [r.id for r in opened(str(folder), task="", split="")] == ids
  assert [r.id for r in open_source(str(folder))] == ids


def test_another_process_and_threads(folder: pathlib.Path) -> None:
  source = opened(str(folder))
  expected = list(source)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(source.__getitem__, range(10))) == expected
  path = folder.parent / "source.pickle"
  path.write_bytes(pickle.dumps(source))
  program = (
    "import pickle, sys\n"
    f"source = pickle.load(open({str(path)!r}, 'rb'))\n"
    "print([r.id for r in source])\n"
    "print('tensorflow' in sys.modules, 'jax' in sys.modules)"
  )
  output = subprocess.run(
    [sys.executable, "-c", program],
    check=True,
    capture_output=True,
    text=True,
  ).stdout.splitlines()
  assert output == [str([r.id for r in expected]), "False False"]


def _cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def _other(path: pathlib.Path) -> None:
  """Puts a shard of the same size and another number of records there."""
  data = path.with_name(NAME.format(2)).read_bytes()
  assert len(data) == path.stat().st_size
  path.write_bytes(data)


def _zero(path: pathlib.Path) -> None:
  path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (pathlib.Path.unlink, "00001-of-00003.array_record: missing"),
    (_cut, "00001-of-00003.array_record: truncated: "),
    (_other, "00001-of-00003.array_record: damaged: 4 records of 3"),
    (_zero, "00001-of-00003.array_record: cannot be read: Corrupted"),
  ],
)
def test_damaged_shards_at_opening(
  folder: pathlib.Path, damage: Any, message: str
) -> None:
  damage(folder / NAME.format(1))
  with pytest.raises(UserError, match=message):
    opened(str(folder))


def test_a_flipped_bit_is_one_bad_record(folder: pathlib.Path) -> None:
  expected = [r.id for r in opened(str(folder))]
  path = folder / NAME.format(1)
  data = bytearray(path.read_bytes())
  data[300] ^= 1
  path.write_bytes(data)
  source = opened(str(folder))
  with pytest.raises(UserError, match=r"cannot be read .*--verify"):
    source[3]
  del expected[3]
  assert [r.id for r in [*source[:3], *source[4:]]] == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"schema_version": 2},
      "has schema version 2; this version of narvl_jax reads versions up to 1",
    ),
    ({"records": 11}, "counts 11 records and 10 in its shards"),
    ({"shards": 3}, "is not a manifest"),
    ({"more": 3}, "is not a manifest"),
    ({"schema_version": "x"}, "is not a manifest"),
  ],
)
def test_manifests_that_do_not_fit(
  folder: pathlib.Path, change: dict[str, Any], message: str
) -> None:
  path = folder / "manifest.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(UserError, match=message):
    opened(str(folder))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"task": "caption"}, 'contains the task "vqa", not "caption"'),
    ({"split": "train"}, 'contains the split "test", not "train"'),
    ({"path": "/nowhere"}, 'there is no file "/nowhere/manifest.json"'),
    ({"path": None}, "options.path is None"),
  ],
)
def test_mistakes_are_explained(
  folder: pathlib.Path, options: dict[str, Any], message: str
) -> None:
  with pytest.raises(UserError, match=message):
    opened(**{"path": str(folder), **options})
