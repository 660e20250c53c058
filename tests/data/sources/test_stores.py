"""Sources in stores deliver the records of local ones."""

import json
import multiprocessing
import pathlib
import pickle
import re
import shutil
from typing import Any

import numpy as np
import pytest

from narvl_jax.data import tasks
from narvl_jax.data.answers import load_answers
from narvl_jax.data.batches.bad_records import (
  BadRecord,
  BadRecords,
  RecordReader,
)
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.sources import load_source, open_source
from narvl_jax.data.sources.annotations import load_annotations
from narvl_jax.data.sources.rows.files import RowFile
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.files import store_cache
from narvl_jax.files.stores import as_path
from narvl_jax.metrics.cider import DocumentFrequencies
from tests.data.sources import tfds_sets, tsv_files
from tests.stores.servers import Store
from tests.support.batches import train_batches

# A request for content, not for the state of a file.
_CONTENT = re.compile(r"GET (/download.*/o/|/bucket-\d+/)rows.tsv(\?|$)")
ROWS = [f"{i}\tq\t{i}\t{'x' * i}".encode() for i in range(1, 60)]


@pytest.fixture(autouse=True)
def cache(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
  """Makes a cache of its own for the test."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  store_cache._remembered.cache_clear()
  return tmp_path / "cache" / "narvl_jax"


@pytest.fixture(params=["gcs", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
  return request.getfixturevalue(request.param)


@pytest.fixture
def bucket(store: Store) -> Any:
  return as_path(store.make_bucket())


def _write_jsonl(bucket: Any) -> str:
  """Writes rows whose pictures are named in four ways."""
  (bucket / "data" / "photos" / "1.jpg").write_bytes(tsv_files.picture(1))
  (bucket / "other" / "2.jpg").write_bytes(tsv_files.picture(2))
  names = ["photos/1.jpg", "../other/2.jpg", f"{bucket}/other/2.jpg", "no.jpg"]
  rows = [json.dumps({"image": x, "target": "a dog"}) for x in names]
  (bucket / "data" / "own.jsonl").write_text("\n".join(rows) + "\n")
  return f"{bucket}/data/own.jsonl"


def _gets(store: Store, name: str) -> int:
  return sum("GET" in x and name in x for x in store.faults.requests)


def test_rows_are_read_by_ranges(
  bucket: Any, store: Store, cache: pathlib.Path
) -> None:
  path = bucket / "rows.tsv"
  path.write_bytes(b"\n".join(ROWS) + b"\n")
  rows = RowFile(path)
  assert list(rows) == ROWS
  assert pickle.loads(pickle.dumps(rows))[7] == ROWS[7]
  name, size, _ = rows.identify()[0]
  assert (name, size) == ("rows.tsv", len(path.read_bytes()))
  # Other machines find the index in the bucket, and do not read the file.
  assert (bucket / "rows.tsv.rows.idx").is_file()
  shutil.rmtree(cache)
  store.faults.requests.clear()
  assert RowFile(path)[-1] == ROWS[-1]
  # The first two bytes, and the row.
  contents = [x for x in store.faults.requests if _CONTENT.search(x)]
  assert len(contents) == 2


def test_an_index_belongs_to_one_version(bucket: Any) -> None:
  path = bucket / "rows.tsv"
  path.write_bytes(b"a\nbb\n")
  rows = RowFile(path)
  before = rows.identify()
  path.write_bytes(b"aa\nb\n")
  for used in (rows, pickle.loads(pickle.dumps(rows))):
    with pytest.raises(UserError, match="changed while it is in use"):
      used[0]
  new = RowFile(path)
  assert list(new) == [b"aa", b"b"]
  assert new.identify() != before


def test_a_read_only_bucket_needs_no_index_in_it(
  bucket: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = bucket / "rows.tsv"
  path.write_bytes(b"a\nb\n")
  store.faults.fail("(POST|PUT) ", 403, times=10)
  assert list(RowFile(path)) == [b"a", b"b"]
  assert not (bucket / "rows.tsv.rows.idx").exists()


def test_tsv_files_by_pattern(bucket: Any) -> None:
  for part in (1, 2):
    rows = [tsv_files.row("caption", 10 * part + i) for i in range(2)]
    (bucket / "sets" / f"train_{part}.tsv").write_bytes(
      b"\n".join(rows) + b"\n"
    )
  source: Any = load_source(
    "ofa_tsv",
    task="caption",
    split="train",
    path=f"{bucket}/sets/{{split}}_*.tsv",
  )
  assert [record.id for record in source] == ["10", "11", "20", "21"]
  assert source.locate(2) == f"{bucket}/sets/train_2.tsv row 1"
  assert source.fingerprint()


def test_pictures_beside_rows_are_cached(bucket: Any, store: Store) -> None:
  source: Any = open_source(_write_jsonl(bucket), task="caption")
  first, second = tsv_files.picture(1), tsv_files.picture(2)
  for _ in range(2):
    assert [source[i].image for i in range(3)] == [first, second, second]
  # Its state, and its content.
  assert _gets(store, "1.jpg") == (2 if store.scheme == "gs" else 1)
  with pytest.raises(UserError, match=r'"(gs|s3)://.*/no.jpg": No such file'):
    source[3]
  store.faults.requests.clear()
  assert source[0].image == first
  assert _gets(store, "1.jpg") == 0


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("rows.tvs", r'no file.*Did you mean "rows.tsv"'),
    ("none/x.tsv", r'There is no folder "(gs|s3)://.*none" either'),
    ("", r"it must be a file, or a pattern"),
  ],
)
def test_missing_files(bucket: Any, name: str, message: str) -> None:
  (bucket / "rows.tsv").write_bytes(b"a\n")
  path = f"{bucket}/{name}".rstrip("/")
  with pytest.raises(UserError, match=message):
    load_source("ofa_tsv", task="vqa", split="train", path=path)


def test_a_missing_bucket(store: Store) -> None:
  path = f"{store.scheme}://nothing-there/x.tsv"
  with pytest.raises(UserError, match=r'There is no bucket ".*nothing-there"'):
    load_source("ofa_tsv", task="vqa", split="train", path=path)


def test_a_throttled_picture_is_read_again(bucket: Any, store: Store) -> None:
  source: Any = open_source(_write_jsonl(bucket), task="caption")
  store.faults.fail("GET .*1.jpg", 429)
  store.faults.fail("GET .*1.jpg", 503)
  assert source[0].image == tsv_files.picture(1)


def test_a_picture_that_cannot_be_read_is_a_bad_record(
  bucket: Any, store: Store, no_waiting: None
) -> None:
  source: Any = open_source(_write_jsonl(bucket), task="caption")
  reader = RecordReader(source, "own")
  store.faults.fail("(GET|HEAD) .*1.jpg", 503, times=100)
  found = reader.read(0, lambda record: record)
  assert isinstance(found, BadRecord)
  assert "the store failed" in found.reason
  store.faults.reset()
  assert not isinstance(reader.read(0, lambda record: record), BadRecord)


def test_a_store_that_fails_ends_the_start(
  bucket: Any, store: Store, no_waiting: None
) -> None:
  path = bucket / "rows.tsv"
  path.write_bytes(b"a\n")
  store.faults.fail("rows.tsv", 503, times=1000)
  with pytest.raises(UserError, match=r"the store failed.*the same command"):
    load_source("ofa_tsv", task="vqa", split="train", path=str(path))


def test_a_store_without_permission(
  bucket: Any, store: Store, no_waiting: None
) -> None:
  store.faults.fail("", 403, times=1000)
  with pytest.raises(UserError, match=r'x.jsonl": no permission'):
    load_source("jsonl", task="vqa", split="train", path=f"{bucket}/x.jsonl")


def test_a_store_without_credentials(gcs: Store, no_waiting: None) -> None:
  path = f"{gcs.make_bucket()}/x.jsonl"
  gcs.faults.fail("", 401, times=1000)
  with pytest.raises(UserError, match=r"no valid credentials for gs.*gcloud"):
    load_source("jsonl", task="vqa", split="train", path=path)


def test_lists_and_tables(bucket: Any) -> None:
  (bucket / "answers.txt").write_text("yes\nno\n")
  assert load_answers(f"{bucket}/answers.txt") == ["yes", "no"]
  with pytest.raises(UserError, match=r'"(gs|s3)://.*none.json": No such file'):
    load_answers(f"{bucket}/none.json")
  frequencies = DocumentFrequencies.of([["a dog"], ["a cat"]], "simple")
  frequencies.save(f"{bucket}/df.tsv.gz")
  assert DocumentFrequencies.load(f"{bucket}/df.tsv.gz") == frequencies
  caption = {"annotations": [{"image_id": 1, "caption": "a dog"}]}
  (bucket / "coco.json").write_text(json.dumps(caption))
  assert load_annotations(f"{bucket}/coco.json", "caption")["1"]["people"] == (
    "a dog",
  )


def test_batches_of_worker_processes(gcs: Store) -> None:
  source: Any = open_source(
    _write_jsonl(as_path(gcs.make_bucket())), task="caption"
  )
  vocabulary = Vocabulary.train(["a dog"], 300)
  entry = MixtureEntry(source, "caption", 1.0, "own")
  made = [
    train_batches(
      [entry], {"caption": tasks.make_task("caption", vocabulary)}, 0,
      batch_size=3, seed=0, image_size=(8, 8), max_text_length=40,
      max_label_length=10, num_workers=workers,
      bad_records=BadRecords(max_fraction=0.5),
    )
    for workers in (0, 1)
  ]  # fmt: skip
  try:
    for _ in range(3):
      here, there = (next(batches) for batches in made)
      assert all(np.array_equal(here[key], there[key]) for key in here)
  finally:
    for batches in made:
      batches.close()


def _image(source: Any, queue: Any) -> None:
  queue.put([source[i].image for i in range(2)])


# jax has threads if a test before used it. The children do not use it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:os.fork")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_open_the_store_themselves(
  gcs: Store, method: str
) -> None:
  source: Any = open_source(
    _write_jsonl(as_path(gcs.make_bucket())), task="caption"
  )
  assert source[0].image == tsv_files.picture(1)
  context: Any = multiprocessing.get_context(method)
  queue = context.Queue()
  workers = [
    context.Process(target=_image, args=(source, queue)) for _ in range(2)
  ]
  for worker in workers:
    worker.start()
  for _ in workers:
    images = queue.get(timeout=120)
    assert images == [tsv_files.picture(1), tsv_files.picture(2)]
  for worker in workers:
    worker.join()


def test_a_data_set_of_tfds(gcs: Store, tmp_path: pathlib.Path) -> None:
  tfds_sets.build(tmp_path / "sets")
  bucket, name = as_path(gcs.make_bucket()), "coco_captions/2014"
  folder: Any = bucket / "tfds" / name
  folder.put(tmp_path / "sets" / name)

  def opened(place: Any, name: str = name) -> Any:
    return load_source(
      "tfds", task="caption", split="train", name=name, data_dir=str(place)
    )

  local, source = opened(tmp_path / "sets"), opened(bucket / "tfds")
  assert list(source) == list(local)
  assert list(pickle.loads(pickle.dumps(source))) == list(local)
  assert source.fingerprint() != local.fingerprint()
  with pytest.raises(UserError, match=r'"ref_coco" is not prepared in "gs://'):
    opened(bucket / "tfds", "ref_coco")
  for file in folder.rglob("*train.array_record*"):
    file.unlink()
  with pytest.raises(UserError, match=r'the file "gs://.*train.*" is missing'):
    opened(bucket / "tfds")
