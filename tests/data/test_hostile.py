"""Files with hostile rows: each makes only its own record bad."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narvl_jax.data import tasks
from narvl_jax.data.batches import pipeline
from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.checking import inspection
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.sources import open_source
from narvl_jax.data.sources.jsonl import KEYS
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.terminal.text import escape
from tests.data import hostile
from tests.data.sources import tsv_files
from tests.support.batches import eval_batches, train_batches

_SHAPES: dict[str, Any] = {
  "image_size": (12, 16),
  "max_text_length": 40,
  "max_label_length": 20,
}


@pytest.fixture(scope="module", params=["jsonl", "tsv"])
def write(request: pytest.FixtureRequest) -> Callable[..., pathlib.Path]:
  """Writes a hostile file."""
  found = {"jsonl": hostile.write_jsonl, "tsv": hostile.write_tsv}
  return found[request.param]


def _open(path: pathlib.Path, task: str) -> Sequence[Record]:
  return open_source(str(path), task=task)


def _learn(source: Sequence[Record], task: str) -> dict[str, tasks.Task[Any]]:
  texts = tasks.vocabulary_texts(task, {}, source)
  vocabulary = Vocabulary.train([*texts], 800, num_bins=16)
  return {task: tasks.make_task(task, vocabulary)}


@pytest.mark.parametrize("task", TASKS)
def test_every_reader_survives(
  tmp_path: pathlib.Path,
  write: Callable[..., pathlib.Path],
  task: str,
) -> None:
  path = write(tmp_path, task, 40)
  source = _open(path, task)
  model_tasks = _learn(source, task)
  reader = RecordReader(source, "x")
  found = [reader.read(i, lambda record: record) for i in range(len(source))]
  unread = {i for i, x in enumerate(found) if isinstance(x, BadRecord)}
  assert not unread & set(range(40))
  assert len(unread) >= 10
  figures = inspection.inspect(
    source, model_tasks[task], inspection.Limits(), max_examples=0
  )
  assert len(unread) <= figures["bad"] < len(source) - 39
  assert all(f"{path} row " in row["place"] for row in figures["bad_rows"])
  json.dumps(figures)
  bad = pipeline.BadRecords(1.0)
  batches = train_batches(
    [MixtureEntry(source, task, 1.0, "mine")],
    model_tasks,
    batch_size=len(source),
    seed=1,
    position=0,
    num_threads=0,
    bad_records=bad,
    **_SHAPES,
  )
  # One epoch: every record, or a neighbour in its place.
  used = {int(i) for i in next(batches)["index"]}
  assert set(range(40)) <= used
  assert not unread & used
  assert bad.count >= len(unread)
  evaluated = eval_batches(
    source,
    model_tasks[task],
    batch_size=64,
    bad_records=pipeline.BadRecords(1.0),
    **_SHAPES,
  )
  read = {
    int(i) for batch, rows in evaluated for i in batch["index"][: len(rows)]
  }
  assert used <= read
  assert not unread & read


@pytest.mark.parametrize("kind", ["deep", "digits", "pair", "home"])
def test_a_file_of_one_known_fault_is_no_defect(
  tmp_path: pathlib.Path, kind: str
) -> None:
  good = hostile.good_row("vqa")
  row = {
    "deep": b"[" * hostile.DEEP,
    "digits": json.dumps({**good, "target": {"two": 10**400}}).encode(),
    "pair": json.dumps({**good, "prompt": "\ud83d"}).encode(),
    "home": json.dumps({**good, "image": "~nosuchuser/x.png"}).encode(),
  }[kind]
  message = {
    "deep": "nested too deep",
    "digits": "the score of the answer 'two' is 1000.*it must be a number",
    "pair": r"half of a surrogate pair, \\ud83d, as its character 2",
    "home": r"cannot read the image .*/~nosuchuser/x.png",
  }[kind]
  (tmp_path / "good.jpg").write_bytes(tsv_files.picture(3))
  path = tmp_path / "own.jsonl"
  path.write_bytes(b"\n".join([row] * 30) + b"\n")
  source = _open(path, "vqa")
  task = tasks.make_task("vqa", Vocabulary.train([" two"], 300, num_bins=16))
  batches = train_batches(
    [MixtureEntry(source, "vqa", 1.0, "mine")],
    {"vqa": task},
    batch_size=4,
    seed=1,
    position=0,
    num_threads=0,
    **_SHAPES,
  )
  with pytest.raises(UserError, match=rf"own.jsonl row \d+.*{message}"):
    next(batches)


_JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(st.characters(), max_size=20)
  | st.sampled_from(hostile.WRONG_VALUES),
  lambda inner: (
    st.lists(inner, max_size=5)
    | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3)
  ),
  max_leaves=8,
)


@settings(
  max_examples=60,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(task=st.sampled_from(TASKS), key=st.sampled_from(KEYS), value=_JSON)
def test_any_value_of_any_key(
  tmp_path: pathlib.Path, task: str, key: str, value: Any
) -> None:
  """Reading gives a record or a `UserError`, never a possible defect."""
  (tmp_path / "good.jpg").write_bytes(tsv_files.picture(3))
  path = tmp_path / "own.jsonl"
  row = json.dumps({**hostile.good_row(task), key: value})
  path.write_text(f"{row}\n{row}\n")
  path.with_name("own.jsonl.rows.idx").unlink(missing_ok=True)
  vocabulary = Vocabulary.train([" two"], 300, num_bins=16)
  encoder = tasks.make_task(task, vocabulary)
  try:
    source = _open(path, task)
    encoder.encode(source[0])
  except (UserError, OverflowError) as error:
    escape(str(error)).encode()


def test_command(
  tmp_path: pathlib.Path, write: Callable[..., pathlib.Path]
) -> None:
  """A table and a verdict are printed on an ASCII terminal."""
  path = write(tmp_path, "vqa", 1500)
  done = subprocess.run(
    [
      *(sys.executable, "-m", "narvl_jax.check_data", str(path), "--task=vqa"),
      *("--max_examples=0", "--json=figures.json"),
    ],
    cwd=tmp_path,
    env={**os.environ, "PYTHONIOENCODING": "ascii"},
    capture_output=True,
    check=False,
  )
  out, err = done.stdout.decode("ascii"), done.stderr.decode("ascii")
  assert done.returncode == 0, err
  assert "Traceback" not in err
  assert "\x1b" not in out + err
  assert "\nbad records    " in out
  assert out.splitlines()[-1].startswith("verdict: usable with these flags: ")
  assert json.loads((tmp_path / "figures.json").read_text())["vqa"]["bad"] > 10
  assert (tmp_path / "data_check.png").stat().st_size > 1000


def test_hostile_files_of_a_folder(tmp_path: pathlib.Path) -> None:
  """One line and exit code 2 for each file without records."""
  (tmp_path / "good.jpg").write_bytes(tsv_files.picture(3))
  files = {
    "empty.jsonl": b"",
    "newlines.jsonl": b"\n\n\n",
    "zip.jsonl": b"\x1f\x8b\x08 packed",
    "letters.tsv": b"no tabs\nnone\n",
  }
  for name, content in files.items():
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=name):
      _open(path, "vqa")
  (tmp_path / "nul.tsv").write_bytes(bytes(5000))
  reader = RecordReader(_open(tmp_path / "nul.tsv", "vqa"), "x")
  assert isinstance(reader.read(0, lambda record: record), BadRecord)
