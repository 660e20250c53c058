"""An error of one record makes it bad, unless all records raise it."""

import pickle
import zlib
from typing import Any

import pytest

from narvl_jax.data import answers, tasks
from narvl_jax.data.answer_text import checked_text
from narvl_jax.data.batches import pipeline
from narvl_jax.data.batches.bad_records import (
  BadRecord,
  RecordReader,
  short_reason,
)
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.checking import inspection
from narvl_jax.data.checking.samples import draw_samples
from narvl_jax.data.shards.writer import PROGRESS, Job, write_shard
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.run import data_checks as run_data
from tests.data.number_source import H, L, NumberSource, T, W, make_tasks
from tests.support.batches import eval_batches, train_batches

# Of every kind that reading, decoding, augmenting or tokenising may raise.
ERRORS = (
  ValueError("torn row"),
  OSError("unreadable"),
  KeyError("column"),
  OverflowError("int too large to convert to float"),
  RecursionError("maximum recursion depth exceeded"),
  RuntimeError("Could not determine home directory."),
  TypeError("'int' object is not iterable"),
  AttributeError("no attribute"),
  ZeroDivisionError("division by zero"),
  AssertionError(),
  StopIteration(),
  SyntaxError("broken PNG file"),
  EOFError(),
  zlib.error("invalid stored block lengths"),
  UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"),
  MemoryError(),
)
DEFECTS = tuple(
  error
  for error in ERRORS
  if not isinstance(
    error, (ValueError, OSError, LookupError, OverflowError, MemoryError)
  )
)


@pytest.fixture(scope="module")
def model_tasks() -> dict[str, Any]:
  return make_tasks()


def _source(count: int, faults: Any = None) -> Any:
  return NumberSource("vqa", count, faults)


def _settings(**changes: Any) -> dict[str, Any]:
  return {
    "batch_size": 8,
    "image_size": (H, W),
    "max_text_length": T,
    "max_label_length": L,
    "num_threads": 0,
    **changes,
  }


def _train(model_tasks: Any, source: Any, **changes: Any) -> Any:
  return train_batches(
    [MixtureEntry(source, "vqa", 1.0, "x")],
    model_tasks,
    seed=0,
    position=0,
    **_settings(**changes),
  )


def _spread_faults() -> dict[int, Any]:
  """Returns a fault of every kind, no two of them adjacent."""
  return {3 * i: error for i, error in enumerate(ERRORS)}


def test_one_record_of_each_kind() -> None:
  faults = _spread_faults()
  source = _source(60, faults)
  # A record that was used shows that the code works.
  for start in (0, 1):
    reader = RecordReader(source, "x")
    for index in range(start, 60):
      found = reader.read(index, lambda record: record.prompt)
      assert isinstance(found, BadRecord) == (index in faults)
      if isinstance(found, BadRecord):
        assert (found.name, found.index, found.total) == ("x", index, 60)
        assert found.what.startswith(f"record {index}: ")
        assert found.what.removeprefix(f"record {index}: ")


def test_no_error_of_a_record_escapes() -> None:
  escaped = []
  for error in ERRORS:
    reader = RecordReader(_source(30, {7: error}), "x")
    try:
      found = reader.read(7, lambda record: record)
    except Exception as e:
      escaped.append(e)
    else:
      assert isinstance(found, BadRecord)
  assert not escaped


@pytest.mark.parametrize("error", ERRORS, ids=lambda x: type(x).__name__)
def test_what_is_done_with_a_record_counts_too(error: Exception) -> None:
  def use(record: Any) -> str:
    if record.id == "vqa4":
      raise error
    return record.id

  found = RecordReader(_source(9), "x").read(4, use)
  assert isinstance(found, BadRecord)
  assert (found.record_id, found.place) == ("vqa4", "record 4")
  assert type(error).__name__ in found.reason or str(error) in found.reason


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("error", DEFECTS, ids=lambda x: type(x).__name__)
def test_all_records_failing_alike_is_a_defect(
  error: Exception, count: int
) -> None:
  source = _source(count, dict.fromkeys(range(count), error))
  reader = RecordReader(source, "x")
  with pytest.raises(type(error)) as raised:
    reader.read(0, lambda record: record)
  assert raised.value is error
  assert reader.defect is error
  (note,) = raised.value.__notes__[-1:]
  assert "records of x that were tried raise" in note
  assert "record 0" in note


def test_known_faults_of_all_records_are_no_defect() -> None:
  for error in (ValueError("torn"), OSError("no"), OverflowError("large")):
    source = _source(20, dict.fromkeys(range(20), error))
    reader = RecordReader(source, "x")
    for index in range(20):
      assert isinstance(reader.read(index, lambda x: x), BadRecord)


def test_only_records_that_can_be_used_are_tried() -> None:
  """A process that writes a shard has labels for its records only."""
  source = _source(100, {i: TypeError("odd") for i in range(40, 60)})
  reader = RecordReader(source, "x", among=range(40, 60))
  with pytest.raises(TypeError, match="odd"):
    reader.read(45, lambda record: record)
  assert set(source.reads) <= set(range(40, 60))


def test_a_defect_in_a_shard_is_no_failed_write(tmp_path: Any) -> None:
  job = Job(
    *("spec", "vqa", "train", {}, str(tmp_path), "x", 30, 3),
    format="tsv",
  )
  (tmp_path / PROGRESS).mkdir()
  source = _source(30, dict.fromkeys(range(30), RuntimeError("ours")))
  with pytest.raises(RuntimeError, match="ours"):
    write_shard(source, job, 1)
  source = _source(30, {12: RuntimeError("odd")})
  note = write_shard(source, job, 1)
  (bad,) = note["bad"]
  assert (bad["index"], bad["reason"]) == (12, "RuntimeError: odd")


def test_the_first_good_record_may_come_late() -> None:
  """A block of damaged rows at the start of a file is not a defect."""
  source = _source(400, dict.fromkeys(range(300), TypeError("odd")))
  reader = RecordReader(source, "x")
  assert isinstance(reader.read(0, lambda record: record), BadRecord)


def test_memory_of_one_record_and_of_the_machine() -> None:
  faults = dict.fromkeys((2, 3, 5, 7, 8, 9), MemoryError())
  reader = RecordReader(_source(20, faults), "x")
  for index in range(9):
    found = reader.read(index, lambda record: record)
    assert isinstance(found, BadRecord) == (index in faults)
  with pytest.raises(UserError, match=r"3 records of x in a row, the last rec"):
    reader.read(9, lambda record: record)


def test_reader_travels_to_other_processes() -> None:
  reader = RecordReader([], "x", 3)
  assert pickle.loads(pickle.dumps(reader)).defect is None


def test_reasons_are_short_lines() -> None:
  assert short_reason(ValueError("a\n  b")) == "a b"
  assert short_reason(ValueError()) == "ValueError"
  assert short_reason(TypeError("odd")) == "TypeError: odd"
  assert len(short_reason(TypeError("x" * 10**6))) < 500
  bad = BadRecord("x", 0, 1, "a.tsv row 1", "odd", "i" * 10**6)
  assert len(bad.what) < 200


def test_a_source_may_return_anything() -> None:
  found = RecordReader([object()], "x", 1)  # pyright: ignore
  bad = found.read(0, lambda record: [][1])
  assert isinstance(bad, BadRecord)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_counts_and_replaces_them(
  model_tasks: dict[str, Any], workers: int
) -> None:
  faults = _spread_faults()
  bad = pipeline.BadRecords(0.9)
  batches = _train(
    model_tasks,
    _source(60, faults),
    num_workers=workers,
    num_threads=2 * workers,
    bad_records=bad,
  )
  for _ in range(16):
    batch = next(batches)
    assert batch["valid"].all()
    assert not set(batch["index"].tolist()) & set(faults)
  batches.close()
  assert bad.count == len(faults)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("count", [3, 500])
def test_training_reports_a_defect(
  model_tasks: dict[str, Any], workers: int, count: int
) -> None:
  faults = dict.fromkeys(range(count), TypeError("a defect of ours"))
  batches = _train(model_tasks, _source(count, faults), num_workers=workers)
  with pytest.raises(TypeError, match="a defect of ours"):
    next(batches)
  batches.close()


@pytest.mark.parametrize("rows", [[0, 1], [7]])
def test_evaluation_reports_a_defect_on_every_host(
  model_tasks: dict[str, Any], rows: list[int]
) -> None:
  faults = dict.fromkeys(range(50), RuntimeError("a defect of ours"))
  batches = eval_batches(
    _source(50, faults),
    model_tasks["vqa"],
    rows=rows,
    **_settings(),
  )
  with pytest.raises(RuntimeError, match="a defect of ours"):
    next(batches)


def test_evaluation_leaves_them_out(model_tasks: dict[str, Any]) -> None:
  faults = _spread_faults()
  bad = pipeline.BadRecords(0.9)
  batches = eval_batches(
    _source(60, faults),
    model_tasks["vqa"],
    bad_records=bad,
    **_settings(),
  )
  ids = [record.id for _, records in batches for record in records]
  assert ids == [f"vqa{i}" for i in range(60) if i not in faults]
  assert bad.count == len(faults)


def test_other_readers_leave_them_out(model_tasks: dict[str, Any]) -> None:
  faults = _spread_faults()
  source = _source(60, faults)
  task = model_tasks["vqa"]
  found: list[BadRecord] = []
  texts = list(tasks.vocabulary_texts("vqa", {}, source, found.append))
  assert len(texts) == 2 * (60 - len(faults))
  assert [bad.index for bad in found] == list(faults)
  assert sum(answers.collect_answers(source, "vqa").values()) == 44
  assert len(run_data.encode_first(source, task, "x")) == 60 - len(faults)
  figures = inspection.inspect(source, task, inspection.Limits())
  assert figures["bad"] == len(faults)
  assert sum(figures["reasons"].values()) >= 10
  assert draw_samples("x", source, task, range(60), (H, W)) is not None


def test_half_a_surrogate_pair(model_tasks: dict[str, Any]) -> None:
  message = r"half of a surrogate pair, \\ud83d, as its character 4"
  with pytest.raises(UserError, match=message):
    checked_text("two\ud83d")
  with pytest.raises(UserError, match=message):
    model_tasks["vqa"].vocabulary.encode("two\ud83d")
  assert checked_text("two 😀") == "two 😀"
  with pytest.raises(UserError, match="has 1,000,001 characters, the limit is"):
    checked_text("x" * 1_000_001)
  assert Vocabulary.train([" two"], 300).encode(" two")
