"""Targets replaced by a teacher's answers, and a config that reads them."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from narvl_jax.configs import common
from narvl_jax.data.batches.pipeline import Batcher
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.shards import conversion, distilled, records
from narvl_jax.data.shards.distilled import Label, Labelled, relabel
from narvl_jax.data.shards.formats import FORMATS
from narvl_jax.data.shards.manifest import Manifest, verify
from narvl_jax.data.shards.writer import write_shard
from narvl_jax.data.sources import load_source, open_source
from narvl_jax.data.tasks import make_task
from narvl_jax.errors import UserError
from narvl_jax.experiment.datasets import load_mixture
from tests.data.task_records import RECORDS, make_vocabulary

VOCABULARY = make_vocabulary()
TASK = {name: make_task(name, VOCABULARY, {}) for name in TASKS}
ANSWERS: dict[str, Any] = {
  "caption": "a red cat",
  "vqa": "red",
  "grounding": (2.0, 1.0, 6.0, 9.0),
  "entailment": "no",
}


@pytest.mark.parametrize("name", TASKS)
def test_records_of_the_same_content_are_equal(name: str):
  record = RECORDS[name]
  assert isinstance(record.image, np.ndarray)
  same = dataclasses.replace(record, image=record.image.copy())
  assert record == same
  for changes in (
    {"image": record.image + 1},
    {"image": record.image[1:]},
    {"image": record.image.astype(np.int32)},
    {"image": record.image.tobytes()},
    {"id": "other"},
    {"answers": {"other": 1.0}},
  ):
    assert record != dataclasses.replace(record, **changes)
  assert record != "record"


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_the_only_target(name: str):
  record = RECORDS[name]
  new = relabel(record, Label(ANSWERS[name], -1.5), TASK[name])
  assert new is not None
  if name == "grounding":
    assert new.box == ANSWERS[name]
  else:
    assert new.answers == {ANSWERS[name]: 1.0}
  same = dataclasses.replace(
    new, answers=record.answers, box=record.box, score=None
  )
  assert same == record
  assert new.score == -1.5
  # The score of a teacher that is certain is kept, too.
  stored = dataclasses.replace(new, score=0.0)
  assert records.deserialize(records.serialize(stored)).score == 0.0
  assert records.deserialize(records.serialize(record)).score is None


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("caption", " "),
    ("caption", "?!"),
    ("vqa", ""),
    ("entailment", "yesno"),
    ("grounding", (0.0, 0.0, 0.0, 0.0)),
    ("grounding", (60.0, 10.0, 20.0, 90.0)),
  ],
)
def test_unusable_answers_keep_the_original_target(name: str, value: Any):
  assert relabel(RECORDS[name], Label(value, -1.0), TASK[name]) is None
  made = labelled([RECORDS[name]], {0: Label(value, -1.0)})
  assert made[0] is RECORDS[name]
  counts = made.counts([0])
  assert (counts["original"], counts["teacher"]) == (1, 0)


def labelled(source: list[Record], labels: dict[int, Label]) -> Labelled:
  batcher = Batcher((32, 32), 40, 20)
  return Labelled(source, labels, TASK[source[0].task], batcher)


def test_counts_of_what_was_kept():
  base = RECORDS["vqa"]
  source = [
    base,
    base,
    dataclasses.replace(base, answers={}, objects=None),
    dataclasses.replace(base, answers={}),
  ]
  labels = {
    0: Label("red", -0.5),  # The best of its answers.
    1: Label("blue", -2.0),
    2: Label("dog", -1.0),
    3: Label("", -9.0),
  }
  made = labelled(source, labels)
  for i in range(3):
    assert made[i].answers == {labels[i].value: 1.0}
  with pytest.raises(
    UserError, match="answer '' is not a target, and the record"
  ):
    made[3]
  assert made.counts(range(4)) == {
    "teacher": 3,
    "original": 0,
    "compared": 2,
    "equal": 1,
    "score": -3.5,
    "objects": 2,
  }
  assert made.counts([1])["equal"] == 0


def test_a_failed_request_reports_the_reason():
  source = [
    dataclasses.replace(RECORDS["vqa"], prompt="?"),
    dataclasses.replace(RECORDS["vqa"], image=b"torn"),
    RECORDS["vqa"],
  ]
  made = labelled(source, {})
  with pytest.raises(UserError, match='prompt of vqa record "v1" is empty'):
    made[0]
  with pytest.raises(UserError, match="image is in no known format"):
    made[1]
  with pytest.raises(UserError, match="the teacher did not answer"):
    made[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
  """A folder of four data sets for each format."""
  made = {}
  for kind in FORMATS:
    made[kind] = tmp_path_factory.mktemp(kind)
    for name in TASKS:
      write_set(made[kind] / name, name, kind)
  return made


def write_set(folder: pathlib.Path, name: str, kind: str) -> Manifest:
  job, origin = conversion.plan(
    "shapes",
    str(folder),
    task=name,
    split="train",
    options={"image_size": 32},
    limit=5,
    shards=2,
    format=kind,
  )

  def write(job, todo, writing):
    del writing
    source = job.open()
    for number in todo:
      labels = {i: Label(ANSWERS[name], -0.1 * i) for i in job.indices(number)}
      made = labelled_of(source, labels, name)
      note = write_shard(made, job, number)
      yield number, {**note, "labels": made.counts(job.indices(number))}

  return conversion.convert(job, origin, log=lambda _: None, write=write)


def labelled_of(source: Any, labels: dict[int, Label], name: str) -> Labelled:
  return Labelled(source, labels, TASK[name], Batcher((32, 32), 40, 20))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", TASKS)
def test_written_files_are_read(folders, kind: str, name: str):
  (found,) = distilled.distilled_sets(folders[kind], [name])
  assert (found.name, found.task, found.split) == (name, name, "train")
  labels = found.manifest.labels or {}
  assert labels["teacher"] == 5
  assert labels["score"] == pytest.approx(-1.0)
  assert verify(folders[kind] / name) == []
  source = load_source(
    found.source, task=found.task, split=found.split, **found.options
  )
  original = open_source("shapes", task=name, split="train", image_size=32)
  assert len(source) == 5
  for i, (new, old) in enumerate(zip(source, original, strict=False)):
    wanted = relabel(old, Label(ANSWERS[name], -0.1 * i), TASK[name])
    assert wanted is not None
    np.testing.assert_array_equal(
      images.prepare_image(new.image, (32, 32)), old.image
    )
    if kind == "tsv":
      # The source does not read these columns.
      wanted = dataclasses.replace(wanted, kind="", score=None)
    assert dataclasses.replace(new, image=b"") == dataclasses.replace(
      wanted, image=b""
    )


def test_a_row_has_the_score_last_and_no_loose_separators():
  tsv = FORMATS["tsv"]
  record = dataclasses.replace(
    RECORDS["vqa"], prompt="a\tb\r\nc", score=-0.25, image=b"x"
  )
  row = tsv.serialize(record).decode()
  assert row.endswith("\n")
  assert row.rstrip("\n").split("\t") == [
    *("v1", "v1", "a b c", "0.3|!+blue&&1.0|!+red&&1.0|!+green", "dog&&cat"),
    *("eA==", "-0.25"),
  ]
  assert tsv.serialize(RECORDS["grounding"]).split(b"\t")[-1] == b"\n"
  record = dataclasses.replace(RECORDS["caption"], answers={"a && b": 1.0})
  with pytest.raises(UserError, match=r"'&&' in 'a && b'.*--format=array_rec"):
    tsv.serialize(record)


def test_names_of_objects_have_a_column_only_where_there_are_any(folders):
  (found,) = distilled.distilled_sets(folders["tsv"], ["vqa"])
  assert found.options["columns"] == "0,5,2,3"
  (found,) = distilled.distilled_sets(folders["array_record"], ["vqa"])
  assert "columns" not in found.options


def test_rows_are_no_array_records(folders):
  with pytest.raises(UserError, match=r"contains other files.*source ofa_tsv"):
    open_source(str(folders["tsv"] / "vqa"))


def test_folders_of_something_else(tmp_path, folders):
  with pytest.raises(UserError, match="has no distilled data; pass the folder"):
    distilled.distilled_sets(tmp_path)
  job, origin = conversion.plan(
    "shapes", str(tmp_path / "plain"), task="vqa", split="train", limit=2
  )
  conversion.convert(job, origin, log=lambda _: None)
  with pytest.raises(UserError, match=r"plain\" was not written by .*distill"):
    distilled.distilled_sets(tmp_path)
  half = tmp_path / "half" / "vqa" / ".convert"
  half.mkdir(parents=True)
  with pytest.raises(UserError, match="not complete: vqa lacks answers; repea"):
    distilled.distilled_sets(tmp_path / "half")


def student(weight: Any = 1.0) -> ConfigDict:
  config: Any = common.default_config(*TASKS)
  for name in TASKS:
    config.data.train[name] = common.train_source(
      "shapes", name, weight=weight, image_size=32
    )
  return config


def sizes(config: Any) -> dict[str, int]:
  """Returns the number of records of each distilled entry by its task."""
  return {
    name.removeprefix("distilled_"): len(source)
    for source, _, _, name in load_mixture(config)
    if name.startswith("distilled_")
  }


@pytest.mark.parametrize("kind", FORMATS)
def test_a_config_mixes_both(folders, kind: str):
  config: Any = student(weight=4)
  common.add_distilled(config, str(folders[kind]), weight=0.25)
  weights = {name: entry.weight for name, entry in config.data.train.items()}
  assert weights == {
    **dict.fromkeys(TASKS, 3.0),
    **dict.fromkeys((f"distilled_{name}" for name in TASKS), 1.0),
  }
  assert sizes(config) == dict.fromkeys(TASKS, 5)


def test_schedules_are_scaled_and_originals_may_be_left_out(folders):
  config: Any = student(weight=((0, 1.0), (100, 3.0)))
  common.add_distilled(config, str(folders["tsv"]), weight=1.0)
  train = config.data.train
  assert train.vqa.weight == ((0, 0.0), (100, 0.0))
  assert train.distilled_vqa.weight == ((0, 1.0), (100, 3.0))


def test_wrong_mixtures(folders):
  config: Any = student()
  with pytest.raises(UserError, match=r"weight=1.5.*above 0, at most 1.*1.0"):
    common.add_distilled(config, str(folders["tsv"]), weight=1.5)
  with pytest.raises(UserError, match="above 0"):
    common.add_distilled(config, str(folders["tsv"]), weight=0.0)
  config.data.train.vqb = config.data.train.vqa
  del config.data.train.vqa
  with pytest.raises(UserError, match=r'"vqa" of the task vqa.*mean "vqb"'):
    common.add_distilled(config, str(folders["tsv"]))


def test_lines_of_a_config_work(folders):
  sets = distilled.distilled_sets(folders["tsv"])
  lines = distilled.how_to_use(folders["tsv"], sets).split("\n")
  code = [line.removeprefix("  ") for line in lines if line.startswith("  ")]
  config: Any = student()
  exec("\n".join(code), {"config": config, "train_source": common.train_source})
  assert config.data.train.vqa.weight == 0.5
  assert len(config.data.train) == 8
  assert sizes(config) == dict.fromkeys(TASKS, 5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", FORMATS)
def test_shards_contain_any_text(
  tmp_path: pathlib.Path, name: str, task: str
) -> None:
  """Written data can be read; TSV replaces characters beyond UTF-8."""
  nasty = "\ud83d two\x1b]0;x\x07 \u2028\x85"
  record = dataclasses.replace(
    RECORDS[task], id=nasty, kind=nasty, prompt=nasty, premise=nasty
  )
  if task in ("caption", "vqa"):
    record = dataclasses.replace(record, answers={nasty: 1.0})
  shards = FORMATS[name]
  path = tmp_path / f"x{shards.suffix}"
  with shards.writing(path) as write:
    write(shards.serialize(record))
  if name == "array_record":
    (data,) = shards.read(path)
    read = records.deserialize(data)
    assert (read.id, read.kind, read.prompt) == (nasty,) * 3
    assert read.answers == record.answers
    return
  (read,) = open_source(str(path), task=task)
  assert read.id == "\ufffd two\x1b]0;x\x07  "
  assert read.box == record.box


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_an_answer_that_a_row_cannot_hold(task: str) -> None:
  record = dataclasses.replace(RECORDS[task], answers={"\0": 1.0})
  with pytest.raises(UserError, match="no character that a TSV file can hold"):
    FORMATS["tsv"].serialize(record)
