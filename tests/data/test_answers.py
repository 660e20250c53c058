import json
import pathlib
import pickle
import subprocess
import sys
from typing import Any

import pytest

from narvl_jax import list_answers
from narvl_jax.data import answers, tasks
from narvl_jax.data.example import Record
from narvl_jax.data.sources import load_source
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from tests.data.task_records import PICTURE, RECORDS, make_vocabulary


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
  return make_vocabulary()


def _file(folder: pathlib.Path, name: str, content: str | bytes) -> str:
  path = folder / name
  if isinstance(content, str):
    content = content.encode()
  path.write_bytes(content)
  return str(path)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("a.txt", "yes\nno way\nÜ 2\n"),
    ("a.txt", "yes\r\n no way \r\nÜ 2"),
    ("a.json", json.dumps(["yes", "no way", "Ü 2"])),
    ("a.json", json.dumps({"yes": 0, "no way": 1, "Ü 2": 2})),
    *(
      ("a.pkl", pickle.dumps({"yes": 0, "no way": 1, "Ü 2": 2}, protocol))
      for protocol in (0, 2, 5)
    ),
  ],
)
def test_load(tmp_path: pathlib.Path, name: str, content: str | bytes) -> None:
  path = _file(tmp_path, name, content)
  assert answers.load_answers(path) == ["yes", "no way", "Ü 2"]


class _Evil:
  """Creates a file if it is unpickled."""

  def __init__(self, path: pathlib.Path) -> None:
    self.path = path

  def __reduce__(self) -> Any:
    return pathlib.Path.touch, (self.path,)


def test_pickles_run_no_code(tmp_path: pathlib.Path) -> None:
  victim = tmp_path / "victim"
  content = pickle.dumps({"yes": _Evil(victim)})
  path = _file(tmp_path, "a.pkl", content)
  with pytest.raises(UserError, match=r"is rejected: it asks for .*pathlib"):
    answers.load_answers(path)
  assert not victim.exists()
  pickle.loads(content)
  assert victim.exists()


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", "yes\n\nno\n", r"entry 2 of .*a\.txt\" is empty; remove it"),
    ("a.txt", "yes\n  \t\n", "entry 2 .* is empty"),
    ("a.txt", "yes\nno\nyes \n", 'entry 3 .* "yes", is also entry 1'),
    ("a.txt", "", "is empty"),
    ("a.txt", b"\xff\xfe", "is not UTF-8"),
    ("a.json", "[]", "is empty"),
    ("a.json", '["a", 3]', "entry 2 .* is 3, not a text"),
    ("a.json", '"yes"', "contains a str; it must be a list"),
    ("a.json", "[", "is not JSON"),
    ("a.pkl", b"", "is rejected"),
    ("a.pkl", pickle.dumps(3), "contains a int; it must be a list"),
    ("a.csv", "yes", r'ends in "\.csv"; it must be a \.txt'),
  ],
)
def test_bad_lists(
  tmp_path: pathlib.Path, name: str, content: str | bytes, message: str
) -> None:
  path = _file(tmp_path, name, content)
  with pytest.raises(UserError, match=rf"{message}.*--config.tasks.vqa"):
    answers.load_answers(path)


def test_missing_file(tmp_path: pathlib.Path) -> None:
  with pytest.raises(UserError, match=r"cannot read .* No such file"):
    answers.load_answers(tmp_path / "none.txt")


def test_encode(vocabulary: Vocabulary) -> None:
  texts = ["red", "red dog"]
  encode = vocabulary.encode
  expected = [encode(" red"), encode(" red dog")]
  assert answers.encode_answers(texts, vocabulary, eos=False) == expected
  ended = answers.encode_answers(texts, vocabulary, eos=True)
  assert ended == [[*ids, vocabulary.eos_id] for ids in expected]
  # The same as the target of a record.
  record = Record("1", "vqa", PICTURE, prompt="what?", answers={"red dog": 1})
  target = tasks.make_task("vqa", vocabulary).encode(record).label_ids
  assert ended[1] == target


@pytest.mark.parametrize(
  ("entry", "problem"), [("猫", "characters without a token"), (" ", "no text")]
)
def test_entries_without_tokens(
  vocabulary: Vocabulary, entry: str, problem: str
) -> None:
  message = rf'answer 2, "{entry}" \(its line.*{problem}.*--config\.tasks'
  with pytest.raises(UserError, match=message):
    answers.encode_answers(["red", entry], vocabulary, eos=True)


def _records(*rows: dict[str, float]) -> list[Record]:
  return [
    Record(str(i), "vqa", PICTURE, prompt="what?", answers=row)
    for i, row in enumerate(rows)
  ]


class _WithBadRecord(list[Record]):
  """A source whose second record cannot be read."""

  def __getitem__(self, index: Any) -> Any:
    if index == 1:
      raise ValueError("damaged")
    return super().__getitem__(index)


def test_collect() -> None:
  records = _records(
    {"red": 1.0, "blue": 0.3}, {"red": 1.0}, {"a  dog\n": 1.0}, {"blue": 1.0}
  )
  counts = answers.collect_answers(records, "vqa")
  assert list(counts.items()) == [("blue", 2), ("red", 2), ("a dog", 1)]
  counts = answers.collect_answers(records, "vqa", max_examples=2)
  assert list(counts.items()) == [("red", 2), ("blue", 1)]
  counts = answers.collect_answers(_WithBadRecord(records), "vqa")
  assert counts == {"blue": 2, "a dog": 1, "red": 1}
  with pytest.raises(UserError, match=r"none of the 1 records has.*--split"):
    answers.collect_answers(_records({}), "vqa")
  with pytest.raises(UserError, match=r'"caption" are not .*--task=vqa'):
    answers.collect_answers(records, "caption")


def test_collect_from_an_endless_source() -> None:
  source = load_source("shapes", task="vqa", split="train")
  with pytest.raises(UserError, match=r"too many to read; set --max_examples"):
    answers.collect_answers(source, "vqa")


def _run(*arguments: Any) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "narvl_jax.list_answers"]
  return subprocess.run(
    [*command, *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
  )


def test_command(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "answers.txt"
  result = _run(
    *("shapes", "--task=vqa", "--max_examples=40"),
    *("--max_answers=3", f"--to={path}"),
  )
  assert result.returncode == 0, result.stderr
  found = answers.load_answers(path)
  assert len(found) == 3
  assert f"--config.tasks.vqa.answers={path}" in result.stdout
  result = _run("shapes", "--task=grounding", f"--to={path}")
  assert result.returncode == 2
  assert result.stderr.count("\n") == 1
  assert "--task=vqa" in result.stderr
  # What was there is kept.
  assert answers.load_answers(path) == found


@pytest.mark.parametrize(
  ("to", "message"),
  [("a.json", r"must be a file \*\.txt"), ("no/a.txt", "is in no folder")],
)
def test_bad_target(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  to: str,
  message: str,
) -> None:
  flags = type("Flags", (), {"to": str(tmp_path / to)})
  monkeypatch.setattr(list_answers.flags, "FLAGS", flags)
  with pytest.raises(UserError, match=message):
    list_answers.main(["list_answers", "shapes"])


def test_answer_spaces(vocabulary: Vocabulary, tmp_path: pathlib.Path) -> None:
  entailment = tasks.make_task("entailment", vocabulary)
  words = [vocabulary.encode(f" {word}") for word in ("yes", "no", "maybe")]
  assert entailment.candidates() == words
  grounding = tasks.make_task("grounding", vocabulary)
  space = grounding.answer_space()
  assert space is not None
  assert space.count == 4
  symbols = [vocabulary.symbol(i) for i in space.tokens]
  assert symbols == [f"<bin_{i}>" for i in range(11)]
  assert grounding.candidates() is None
  caption = tasks.make_task("caption", vocabulary)
  assert caption.answer_space() is None
  assert caption.candidates() is None

  # Braces belong to the name: it is no prompt.
  path = _file(tmp_path, "{list}.txt", "red dog\nred cat\ndog\n")
  vqa = tasks.make_task("vqa", vocabulary, {"answers": path})
  encode = vocabulary.encode
  assert vqa.candidates() == [
    encode(" red dog"),
    encode(" red cat"),
    [*encode(" dog")],
  ]
  short = tasks.make_task(
    "vqa", vocabulary, {"answers": path, "max_target_words": 1}
  )
  assert short.candidates() == [encode(" red"), encode(" dog")]
  assert vqa.encode(RECORDS["vqa"]).label_ids


def test_vqa_without_a_list(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("vqa", vocabulary)
  message = "--to=answers.txt, and set --config.tasks.vqa.answers=answers.txt"
  with pytest.raises(UserError, match=message):
    task.candidates()
