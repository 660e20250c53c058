"""JSON lines: a user's own data, and every way a row can be bad."""

import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
from typing import Any

import pytest

from narvl_jax.data import tasks
from narvl_jax.data.batches import pipeline
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.example import Record
from narvl_jax.data.sources import load_source, locate, open_source
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from tests.data.sources import tsv_files
from tests.support.batches import train_batches

IMAGE = tsv_files.picture(0)


def write(folder: pathlib.Path, rows: list[Any]) -> str:
  """Writes rows, texts as they are, and a picture; returns the path."""
  (folder / "photos").mkdir(exist_ok=True)
  (folder / "photos" / "1.jpg").write_bytes(IMAGE)
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  path = folder / "own.jsonl"
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return str(path)


def source(folder: pathlib.Path, task: str, rows: list[Any]) -> Any:
  path = write(folder, rows)
  return load_source("jsonl", task=task, split="train", path=path)


def read(folder: pathlib.Path, task: str, **values: Any) -> Record:
  """Returns the record of one row."""
  return source(folder, task, [{"image": "photos/1.jpg", **values}])[0]


@pytest.mark.parametrize(
  ("task", "values", "expected"),
  [
    (
      "caption",
      {"target": " a dog "},
      {"answers": {"a dog": 1.0}},
    ),
    (
      "caption",
      {"target": ["a dog", "two cats", "a dog", ""]},
      {"answers": {"a dog": 1.0, "two cats": 1.0}},
    ),
    (
      "vqa",
      {"prompt": "how many?", "target": "two", "objects": ["dog", "tree"]},
      {
        "prompt": "how many?",
        "answers": {"two": 1.0},
        "objects": ("dog", "tree"),
      },
    ),
    ("vqa", {"target": ["two", "2"]}, {"answers": {"two": 1.0, "2": 1.0}}),
    (
      "vqa",
      {"target": {"two": 1, "2": 0.3}, "kind": "count", "objects": []},
      {"answers": {"two": 1.0, "2": 0.3}, "kind": "count", "objects": ()},
    ),
    (
      "grounding",
      {"prompt": "left dög", "target": [1, 2.5, 3, 4]},
      {"prompt": "left dög", "box": (1.0, 2.5, 3.0, 4.0)},
    ),
    (
      "entailment",
      {"prompt": "a dog runs", "premise": "a dog", "target": "entailment"},
      {"prompt": "a dog runs", "premise": "a dog", "answers": {"yes": 1.0}},
    ),
    ("entailment", {"target": "maybe"}, {"answers": {"maybe": 1.0}}),
    ("vqa", {"prompt": "how many?"}, {"prompt": "how many?"}),
    ("grounding", {"prompt": "dog", "target": None}, {"prompt": "dog"}),
  ],
)
def test_values(
  tmp_path: pathlib.Path,
  task: str,
  values: dict[str, Any],
  expected: dict[str, Any],
) -> None:
  record = read(tmp_path, task, **values)
  assert record == Record("own.jsonl:1", task, IMAGE, **expected)
  assert read(tmp_path, task, id="q7", **values).id == "q7"
  assert read(tmp_path, task, id=17, **values).id == "17"


def test_pictures_are_beside_the_file(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  records = source(tmp_path, "vqa", [{"image": "photos/1.jpg"}] * 2)
  monkeypatch.chdir("/")
  assert records[1].image == IMAGE
  absolute = str(tmp_path / "photos" / "1.jpg")
  assert source(tmp_path, "vqa", [{"image": absolute}])[0].image == IMAGE


def test_rows_of_other_tasks_are_left_out(tmp_path: pathlib.Path) -> None:
  rows: list[Any] = [
    {"task": "caption", "target": "0"},
    {"task": "vqa", "target": "1"},
    # It names no task, though the word is there.
    {"prompt": 'what is the "task"?', "target": "2"},
    {"task": "vqa", "target": "3"},
    # The row names no known task; both sources report it.
    {"task": "vqaa", "target": "4"},
    "{",
  ]
  for row in rows[:5]:
    row["image"] = "photos/1.jpg"
  questions = source(tmp_path, "vqa", rows)
  assert len(questions) == 5
  assert [list(questions[i].answers) for i in range(3)] == [["1"], ["2"], ["3"]]
  assert questions[1].id == "own.jsonl:3"
  assert locate(questions, 1) == f"{tmp_path}/own.jsonl row 3"
  captions = open_source(str(tmp_path / "own.jsonl"), task="caption")
  assert len(captions) == 4
  assert list(captions[0].answers) == ["0"]
  for records, index in ((questions, 3), (captions, 2)):
    with pytest.raises(UserError, match=r"task is 'vqaa'\. Did you mean \"vqa"):
      records[index]
    assert locate(records, index) == f"{tmp_path}/own.jsonl row 5"
  message = r'no row of ".*own.jsonl" has the task "vqa", the rows have caption'
  with pytest.raises(UserError, match=message):
    source(tmp_path, "vqa", rows[:1])


# name: the bad row (of a question, a box for "box"), what is said of it
BAD: dict[str, tuple[Any, str]] = {
  "no JSON": ("{'image'}", "not JSON (Expecting property name enclosed in dou"),
  "cut": ('{"image": "a"', "the row is not JSON"),
  "list": ("[1]", "the row is a JSON list; it must be an object in braces"),
  "empty": ("", "the row is not JSON (Expecting value at character 1)"),
  "NUL": ('{"image": "\0"}', "the row contains 1 NUL bytes"),
  "unknown key": (
    {"image": "photos/1.jpg", "answer": "two", "targett": "x"},
    'the key "answer" is unknown. Valid: id, image, kind,',
  ),
  "misspelt key": ({"imge": "x"}, 'key "imge" is unknown. Did you mean "imag'),
  "no image": ({"prompt": "x"}, 'the row has no "image"'),
  "image is not a text": (
    {"image": 3},
    '"image" is 3; it must be a text in quot',
  ),
  "image is absent": (
    {"image": "photos/2.jpg"},
    'photos/2.jpg": No such file or directory; names are relative to the',
  ),
  "image is a folder": ({"image": "photos"}, "cannot read the image"),
  "image is no picture": (
    {"image": "own.jsonl", "prompt": "x", "target": "y"},
    "is in no known format",
  ),
  "prompt is not a text": (
    {"image": "photos/1.jpg", "prompt": ["x"]},
    "\"prompt\" is ['x']; it must be a text in quotes",
  ),
  "prompt is empty": (
    {"image": "photos/1.jpg", "target": "x"},
    "the prompt of vqa record",
  ),
  "no target": (
    {"image": "photos/1.jpg", "prompt": "x"},
    "has no answer",
  ),
  "objects are a text": (
    {"image": "photos/1.jpg", "objects": "dog"},
    "\"objects\" is 'dog'; it must be a list of names",
  ),
  "empty answer": (
    {"image": "photos/1.jpg", "target": ""},
    "an answer is empty: '' with score 1",
  ),
  "answer is a number": (
    {"image": "photos/1.jpg", "target": 2},
    "the answer 2 is not a text; put it in quotes",
  ),
  "score above 1": (
    {"image": "photos/1.jpg", "target": {"two": 10}},
    "the score of the answer 'two' is 10; it must be above 0, at most 1",
  ),
  "score is not a number": (
    {"image": "photos/1.jpg", "target": {"two": True}},
    "the score of the answer 'two' is True; it must be a number",
  ),
}


def _batches(records: Any, task: str, bad: pipeline.BadRecords) -> Any:
  texts = tasks.vocabulary_texts(task, {}, records[:3])
  vocabulary = Vocabulary.train(list(texts) * 2, 300, num_bins=16)
  return train_batches(
    [MixtureEntry(records, task, 1.0, "mine")],
    {task: tasks.make_task(task, vocabulary)},
    batch_size=5,
    seed=1,
    position=0,
    image_size=(12, 16),
    max_text_length=80,
    max_label_length=40,
    num_threads=0,
    bad_records=bad,
  )


@pytest.mark.parametrize(
  ("given", "shown"),
  [
    (0, "0"),
    (0.0, "0.0"),
    (False, "False"),
    (7, "7"),
    ("", ""),
    ("a", "a"),
    (None, "own.jsonl:1"),
  ],
)
def test_an_id_that_is_given_counts(
  tmp_path: pathlib.Path, given: Any, shown: str
) -> None:
  row = {"image": "photos/1.jpg", "prompt": "how many?", "id": given}
  assert source(tmp_path, "vqa", [row])[0].id == shown


def test_a_row_of_gigantic_json(tmp_path: pathlib.Path) -> None:
  records = source(tmp_path, "vqa", [{"target": [[]] * 4_300_000}])
  with pytest.raises(UserError, match=r"has 17,200,\d+ bytes, the limit is"):
    records[0]


@pytest.mark.parametrize("task", [0, False, [], {}, "vqaa"])
def test_a_task_that_is_none(tmp_path: pathlib.Path, task: Any) -> None:
  row = {"image": "photos/1.jpg", "prompt": "how many?", "task": task}
  with pytest.raises(UserError, match="the task is "):
    source(tmp_path, "vqa", [row])[0]
  row["task"] = ""
  assert source(tmp_path, "vqa", [row])[0].task == "vqa"


def test_only_a_leading_tilde_is_the_home_folder(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  row = {"image": "~/1.jpg", "prompt": "how many?"}
  source(tmp_path, "vqa", [row])
  monkeypatch.setenv("HOME", str(tmp_path / "photos"))
  assert source(tmp_path, "vqa", [row])[0].image
  for name in ("~nosuchuser/x.png", "~root/x.png"):
    with pytest.raises(UserError, match=f"{tmp_path}/{name}"):
      source(tmp_path, "vqa", [{**row, "image": name}])[0]
  folder = tmp_path / "~nosuchuser"
  folder.mkdir()
  (folder / "x.png").write_bytes((tmp_path / "photos" / "1.jpg").read_bytes())
  row["image"] = "~nosuchuser/x.png"
  assert source(tmp_path, "vqa", [row])[0].image


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_skipped(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
  """Counted, logged once with file and row, replaced by the next row."""
  row, message = BAD[name]
  good = {"image": "photos/1.jpg", "prompt": "how many?", "target": "two"}
  rows: list[Any] = [good] * 10
  rows[4] = row
  records = source(tmp_path, "vqa", rows)
  bad = pipeline.BadRecords(max_fraction=0.1)
  with caplog.at_level(logging.WARNING, logger="absl"):
    batches = list(itertools.islice(_batches(records, "vqa", bad), 4))
  used = [int(i) for batch in batches for i in batch["index"]]
  assert sorted(set(used)) == [i for i in range(10) if i != 4]
  assert bad.count == 1
  (reported,) = [r.getMessage() for r in caplog.records]
  assert message in reported
  assert f"{tmp_path}/own.jsonl row 5" in reported
  assert "\n" not in reported


@pytest.mark.parametrize(
  ("task", "target", "message"),
  [
    ("grounding", [1, 2, 3], "the box is [1, 2, 3]; it must be four numbers"),
    ("grounding", "1234", "the box is '1234'; it must be four numbers"),
    ("grounding", 7, "the box is 7; it must be four numbers"),
    (
      "grounding",
      {"5": 0, "6": 1, "70": 2, "80": 3},
      "the box is {'5': 0, '6': 1, '70': 2, '80': 3}; it must be four numbers",
    ),
    ("grounding", [1, 2, 30, True], "it must be four numbers"),
    ("grounding", [1, 2, 30, float("nan")], "a number that is not finite"),
    ("grounding", [10, 20, 5, 40], "has no area;"),
    ("caption", "  ", "the caption is empty"),
    ("caption", [], "the caption is empty"),
    ("caption", ["a dog", 3], "the captions ['a dog', 3] must be texts"),
    ("entailment", "neutrall", 'label "neutrall" is unknown. Did you mean'),
    ("entailment", 1, 'the label "1" is unknown'),
    ("vqa", {"": 0.5}, "an answer is empty: '' with score 0.5"),
  ],
)
def test_bad_targets(
  tmp_path: pathlib.Path, task: str, target: Any, message: str
) -> None:
  with pytest.raises(UserError) as error:
    read(tmp_path, task, prompt="x", target=target)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_other_encoding(tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(write(tmp_path, [{"image": "photos/1.jpg"}]))
  path.write_bytes(b'{"image": "photos/1.jpg"}\n{"prompt": "caf\xe9"}\n')
  records = open_source(str(path), task="vqa")
  with pytest.raises(UserError, match="row is not UTF-8 at byte 16"):
    records[1]


def test_odd_ends_of_rows(tmp_path: pathlib.Path) -> None:
  row = b'{"image": "photos/1.jpg", "prompt": "%d?"}'
  path = pathlib.Path(write(tmp_path, []))
  rows = [row % i for i in range(3)]
  path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows[:2]) + b"\n" + rows[2])
  records: Any = open_source(str(path), task="vqa")
  assert [record.prompt for record in records] == ["0?", "1?", "2?"]
  assert len(records.notes()) == 3


def test_mistakes(tmp_path: pathlib.Path) -> None:
  path = write(tmp_path, [{"image": "photos/1.jpg"}])
  with pytest.raises(UserError, match=r'jsonl: there is no task "vqq"'):
    open_source(path, task="vqq")
  with pytest.raises(UserError, match=r"jsonl: options.path is None"):
    load_source("jsonl", task="vqa", split="train")
  with pytest.raises(UserError, match=r'no file .* Did you mean "own.jsonl"'):
    open_source(path.replace("own", "won"), task="vqa")


def _answers(records: Any) -> tuple[int, list[Any]]:
  return os.getpid(), [list(record.answers) for record in records]


def test_spawned_process(tmp_path: pathlib.Path) -> None:
  rows = [
    {"image": "photos/1.jpg", "task": task, "target": f"{i}"}
    for i, task in enumerate(("vqa", "caption", "vqa"))
  ]
  records = source(tmp_path, "vqa", rows)
  assert len(pickle.dumps(records)) < 2000
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    pid, answers = pool.apply(_answers, (records,))
  assert pid != os.getpid()
  assert answers == [["0"], ["2"]]
