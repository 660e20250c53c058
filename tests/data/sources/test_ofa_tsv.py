"""OFA TSV files: what the columns mean, and every way a row can be bad."""

import base64
import io
import itertools
import logging
import multiprocessing
import os
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data import tasks
from narvl_jax.data.batches import pipeline
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.sources import load_source, locate, ofa_tsv, open_source
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from tests.data.sources import tsv_files
from tests.support.batches import train_batches


def source(
  folder: pathlib.Path, task: str, rows: Any = 3, **options: Any
) -> Any:
  """A source of rows, or of so many good ones."""
  if isinstance(rows, int):
    rows = [tsv_files.row(task, i) for i in range(rows)]
  path = tsv_files.write(folder / f"{task}_train.tsv", rows)
  return load_source(
    "ofa_tsv", **{"path": str(path), "task": task, "split": "train", **options}
  )


EXPECTED = {
  "caption": {"answers": {"a dog 2": 1.0, "two cats": 1.0}},
  "vqa": {
    "prompt": "how many dogs, 2?",
    "answers": {"two": 0.6, "2": 0.9},
    "objects": ("dog", "big tree"),
  },
  "grounding": {"prompt": "left dog 2", "box": (1.5, 2.0, 11.25, 9.0)},
  "entailment": {
    "prompt": "animals outside 2",
    "premise": "two dogs run",
    "answers": {"maybe": 1.0},
  },
}


@pytest.mark.parametrize("task", TASKS)
def test_columns(tmp_path: pathlib.Path, task: str) -> None:
  records = source(tmp_path, task)
  assert len(records) == 3
  image = tsv_files.picture(2)
  assert records[2] == Record("2", task, image, **EXPECTED[task])
  assert records[-1] == records[np.int64(2)] == records[1:][1]
  assert locate(records, 2) == f"{tmp_path}/{task}_train.tsv row 3"
  with pytest.raises(IndexError, match="no record 3 of 3"):
    records[3]


def test_selected_columns(tmp_path: pathlib.Path) -> None:
  by_image = source(tmp_path, "caption", columns="1,4,2")
  assert by_image[1].id == "im1"
  assert by_image[1].answers == source(tmp_path, "caption")[1].answers
  without_objects = source(tmp_path, "vqa", columns=(0, 5, 2, 3))
  assert without_objects[1].objects is None
  # Other columns may be in the file, the same number in each row.
  rows = [b"new\t" + tsv_files.row("grounding", i) for i in range(3)]
  rows[1] += b"\tmore"
  plain = source(tmp_path, "grounding")[2]
  shifted = source(tmp_path, "grounding", rows, columns="1, 5, 3, 4")
  assert shifted[2] == plain
  with pytest.raises(UserError, match="row has 7 columns, not 6"):
    shifted[1]


def test_several_files_and_splits(tmp_path: pathlib.Path) -> None:
  contents = {"a_train": (0, 1), "b_train": (7,), "a_testA": (9,)}
  for name, numbers in contents.items():
    rows = [tsv_files.row("grounding", i) for i in numbers]
    tsv_files.write(tmp_path / f"{name}.tsv", rows)

  def ids(path: Any, split: str) -> list[str]:
    records = load_source("ofa_tsv", task="grounding", split=split, path=path)
    return [record.id for record in records]

  assert ids(f"{tmp_path}/*_{{split}}.tsv", "train") == ["0", "1", "7"]
  assert ids(f"{tmp_path}/*_{{split}}.tsv", "testA") == ["9"]
  records = open_source(
    f"{tmp_path}/?_{{split}}.tsv", task="grounding", split="train"
  )
  assert locate(records, 2) == f"{tmp_path}/b_train.tsv row 1"


def test_odd_files_are_read_right(tmp_path: pathlib.Path) -> None:
  rows = [tsv_files.row("entailment", i) for i in range(4)]
  data = b"\xef\xbb\xbf" + rows[0] + b"\r\n" + rows[1] + b"\n" + rows[2]
  data += b"\r\n" + rows[3]
  path = tmp_path / "odd.tsv"
  path.write_bytes(data)
  odd: Any = open_source(str(path), task="entailment")
  plain = source(tmp_path, "entailment", rows)
  assert list(odd) == list(plain)
  assert odd[0].id == "0"
  assert len(odd.notes()) == 3
  assert odd.notes()[1] == f"{path}: 2 rows end with CRLF, the others with LF"


@pytest.mark.parametrize("size", range(40))
def test_both_base64_alphabets(size: int) -> None:
  data = np.random.default_rng(size).bytes(size + 1) + b"\xfb\xef\xff\xfe"
  for encode in (base64.b64encode, base64.urlsafe_b64encode):
    assert ofa_tsv.decode_base64(encode(data)) == data
  field = base64.b64encode(data)
  for broken in (
    field[:-1],
    field + b"AAAA" if field.endswith(b"=") else field + b"A",
    b"%" + field[1:],
    field[:3] + b"\xe4" + field[4:],
    field[:4] + b" " + field[4:],
    field[:4] + b"\r" + field[4:],
    b"-" + field[1:-2] + b"!=",
  ):
    with pytest.raises(UserError, match="picture's column is broken base64"):
      ofa_tsv.decode_base64(broken)


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    ("1.0|!+yes", {"yes": 1.0}),
    ("0.3|!+a&&1|!+b&&0.6|!+a&&.2|!+a", {"a": 0.6, "b": 1.0}),
    ("0.9|!+ice cream|!+x", {"ice cream|!+x": 0.9}),
    ("", {}),
  ],
)
def test_answers(
  tmp_path: pathlib.Path, given: str, expected: dict[str, float]
) -> None:
  (record,) = source(tmp_path, "vqa", [tsv_files.row("vqa", 0, {3: given})])
  assert record.answers == expected
  assert list(record.answers) == list(expected)


def test_empty_objects_are_not_missing(tmp_path: pathlib.Path) -> None:
  (record,) = source(tmp_path, "vqa", [tsv_files.row("vqa", 0, {4: ""})])
  assert record.objects == ()


@pytest.mark.parametrize(
  ("label", "answer"),
  [
    ("entailment", "yes"),
    ("contradiction", "no"),
    ("neutral", "maybe"),
    ("no", "no"),
  ],
)
def test_labels(tmp_path: pathlib.Path, label: str, answer: str) -> None:
  rows = [tsv_files.row("entailment", 0, {5: label})]
  assert source(tmp_path, "entailment", rows)[0].answers == {answer: 1.0}


PICTURE = {"caption": 4, "vqa": 5, "grounding": 4, "entailment": 2}


def _cut(task: str) -> bytes:
  pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG")
  field = base64.b64encode(file.getvalue()[:900])
  return tsv_files.row(task, 5, {PICTURE[task]: field})


def _bomb(task: str) -> bytes:
  # A PNG of few bytes that claims to be large.
  file = io.BytesIO()
  Image.new("1", (10_000, 8_001)).save(file, "PNG")
  field = base64.b64encode(file.getvalue())
  return tsv_files.row(task, 5, {PICTURE[task]: field})


# name: task, the bad row, what is said of it
BAD: dict[str, tuple[str, bytes, str]] = {
  "missing column": (
    "vqa",
    tsv_files.row("vqa", 5).replace(b"\t", b" ", 1),
    "the row has 5 columns, not 6",
  ),
  "another column": (
    "caption",
    tsv_files.row("caption", 5) + b"\t",
    "the row has 6 columns, not 5",
  ),
  "empty row": ("caption", b"", "the row has 1 columns, not 5"),
  "broken base64": (
    "entailment",
    tsv_files.row("entailment", 5, {2: "%%%%"}),
    "picture's column is broken base64 (4 characters",
  ),
  "no picture": (
    "grounding",
    tsv_files.row("grounding", 5, {4: ""}),
    "picture's column is empty",
  ),
  "other file": (
    "grounding",
    tsv_files.row("grounding", 5, {4: base64.b64encode(b"GIT")}),
    "the image is in no known format",
  ),
  "cut JPEG": ("vqa", _cut("vqa"), "the image is damaged or cut off"),
  "bomb": (
    "entailment",
    _bomb("entailment"),
    "the image has 10000 x 8001 pixels; the limit is 80,000,000 pixels",
  ),
  "empty caption": (
    "caption",
    tsv_files.row("caption", 5, {2: " && "}),
    "the caption is empty",
  ),
  "no confidence": (
    "vqa",
    tsv_files.row("vqa", 5, {3: "0.6|!+yes&&no"}),
    "the answer 'no' has no confidence; answers look like 0.6|!+yes",
  ),
  "word for a confidence": (
    "vqa",
    tsv_files.row("vqa", 5, {3: "high|!+yes"}),
    "the score of the answer 'yes' is 'high'; it must be a number",
  ),
  "confidence 0": (
    "vqa",
    tsv_files.row("vqa", 5, {3: "0.0|!+yes"}),
    "the score of the answer 'yes' is 0.0; it must be above 0",
  ),
  "confidence NaN": (
    "vqa",
    tsv_files.row("vqa", 5, {3: "nan|!+yes"}),
    "the score of the answer 'yes' is nan; it must be above 0",
  ),
  "confidence above 1": (
    "vqa",
    tsv_files.row("vqa", 5, {3: "1.1|!+yes"}),
    "the score of the answer 'yes' is 1.1; it must be above 0, at most 1",
  ),
  "empty answer": (
    "vqa",
    tsv_files.row("vqa", 5, {3: "0.6|!+ "}),
    "an answer is empty: ' ' with score '0.6'",
  ),
  "unknown label": (
    "entailment",
    tsv_files.row("entailment", 5, {5: "entailed"}),
    'the label "entailed" is unknown. Did you mean "entailment"?',
  ),
  "three numbers": (
    "grounding",
    tsv_files.row("grounding", 5, {3: "1,2,3"}),
    "the box is ['1', '2', '3']; it must be four numbers",
  ),
  "no number": (
    "grounding",
    tsv_files.row("grounding", 5, {3: "1,2,3,x"}),
    "it must be four numbers x0, y0, x1, y1",
  ),
  "NaN in the box": (
    "grounding",
    tsv_files.row("grounding", 5, {3: "1,nan,3,4"}),
    "contains a number that is not finite",
  ),
  "box of no width": (
    "grounding",
    tsv_files.row("grounding", 5, {3: "4,2,4,5"}),
    "has no area",
  ),
  "box upside down": (
    "grounding",
    tsv_files.row("grounding", 5, {3: "1,5,4,2"}),
    "has no area; it must be x0, y0, x1, y1 with x0 < x1",
  ),
  "NUL bytes": (
    "grounding",
    tsv_files.row("grounding", 5, {2: "left\0dog"}),
    "the row contains 1 NUL bytes",
  ),
  "other encoding": (
    "vqa",
    tsv_files.row("vqa", 5, {2: "café?".encode("latin-1")}),
    "the column 2 is not UTF-8 at byte 4",
  ),
}


def _batches(
  records: Any, task: str, bad: pipeline.BadRecords, threads: int = 0
) -> Any:
  texts = tasks.vocabulary_texts(task, {}, records[:5])
  vocabulary = Vocabulary.train(list(texts) * 2, 300, num_bins=16)
  return train_batches(
    [MixtureEntry(records, task, 1.0, "mine")],
    {task: tasks.make_task(task, vocabulary)},
    batch_size=7,
    seed=1,
    position=0,
    image_size=(12, 16),
    max_text_length=80,
    max_label_length=40,
    num_threads=threads,
    bad_records=bad,
  )


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_skipped(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
  """Counted, logged once with file and row, replaced by the next row."""
  task, row, message = BAD[name]
  rows = [tsv_files.row(task, i) for i in range(14)]
  rows[5] = row
  records = source(tmp_path, task, rows)
  bad = pipeline.BadRecords(max_fraction=0.1)
  with caplog.at_level(logging.WARNING, logger="absl"):
    batches = list(itertools.islice(_batches(records, task, bad), 6))
  used = [int(i) for batch in batches for i in batch["index"]]
  assert sorted(set(used)) == [i for i in range(14) if i != 5]
  assert used.count(6) == 6
  assert all(batch["valid"].all() for batch in batches)
  assert bad.count == 1
  (reported,) = [r.getMessage() for r in caplog.records]
  assert message in reported
  assert f"{tmp_path}/{task}_train.tsv row 6" in reported
  assert "\n" not in reported


def test_too_many_bad_rows(tmp_path: pathlib.Path) -> None:
  rows = [tsv_files.row("vqa", i) for i in range(40)]
  for number in (6, 17, 30):
    rows[number] = tsv_files.row("vqa", number, {3: "yes"})
  records = source(tmp_path, "vqa", rows)
  batches = _batches(records, "vqa", pipeline.BadRecords(0.05))
  message = r"3 of 40 records of mine are bad.*vqa_train.tsv row \d+.*no conf"
  with pytest.raises(UserError, match=message):
    list(itertools.islice(batches, 10))


def test_changed_file_stops_the_run(tmp_path: pathlib.Path) -> None:
  records = source(tmp_path, "vqa", 40)
  batches = _batches(records, "vqa", pipeline.BadRecords(0.05))
  next(batches)
  with open(tmp_path / "vqa_train.tsv", "ab") as file:
    file.write(b"more\n")
  with pytest.raises(UserError, match=r"are bad.*changed while it is in use"):
    list(itertools.islice(batches, 10))


def test_good_rows_keep_their_content(tmp_path: pathlib.Path) -> None:
  records = source(tmp_path, "grounding", 14)
  bad = pipeline.BadRecords()
  batches = _batches(records, "grounding", bad, threads=2)
  for batch in itertools.islice(batches, 4):
    for row, index in enumerate(batch["index"]):
      picture = images.prepare_image(tsv_files.picture(int(index)), (12, 16))
      np.testing.assert_array_equal(batch["image"][row], picture)
  assert bad.count == 0


def _ids(records: Any) -> tuple[int, list[str]]:
  return os.getpid(), [record.id for record in records]


def test_spawned_process(tmp_path: pathlib.Path) -> None:
  records = source(tmp_path, "vqa", 5)
  assert len(pickle.dumps(records)) < 2000
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    pid, ids = pool.apply(_ids, (records,))
  assert pid != os.getpid()
  assert ids == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"task": "vqaa"}, r'ofa_tsv: there is no task "vqaa".*"vqa".*--task'),
    ({"path": None}, r"ofa_tsv: options.path is None"),
    (
      {"columns": "0,4"},
      r"columns is '0,4'; vqa needs 4 or 5 column numbers.*\"0,5,2,3,4\"",
    ),
    ({"columns": "0,a,2,3"}, r"options.columns is '0,a,2,3'"),
    ({"columns": (0, 1, 2, -3)}, r"options.columns is \(0, 1, 2, -3\)"),
    (
      {"columns": "0,6,2,3"},
      r'vqa_train.tsv" has 6 columns; vqa reads columns 0,6,2,3 .* least 7',
    ),
    ({"colums": "0"}, r'unknown option "colums"\. Did you mean "columns"'),
  ],
)
def test_mistakes(
  tmp_path: pathlib.Path, options: dict[str, Any], message: str
) -> None:
  source(tmp_path, "vqa")
  path = str(tmp_path / "vqa_train.tsv")
  defaults = {"task": "vqa", "split": "train", "path": path}
  with pytest.raises(UserError, match=message) as error:
    load_source("ofa_tsv", **{**defaults, **options})
  assert "\n" not in str(error.value)


def test_file_of_another_task(tmp_path: pathlib.Path) -> None:
  source(tmp_path, "caption")
  path = str(tmp_path / "caption_train.tsv")
  with pytest.raises(UserError, match=r"has 5 columns; vqa reads .* least 6"):
    open_source(path, task="vqa")


def test_first_row_may_be_damaged(tmp_path: pathlib.Path) -> None:
  rows = [b"x\ty", *(tsv_files.row("vqa", i) for i in range(3))]
  records = source(tmp_path, "vqa", rows)
  assert records.num_columns == 6
  with pytest.raises(UserError, match="row has 2 columns, not 6"):
    records[0]
