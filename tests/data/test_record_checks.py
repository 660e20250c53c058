"""Fields of wrong types and values make a bad record in every source."""

import dataclasses
import json
from typing import Any

import msgpack
import numpy as np
import pytest

from narvl_jax.data import tasks
from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.checking import inspection
from narvl_jax.data.example import Record
from narvl_jax.data.record_checks import checked_record
from narvl_jax.data.shards import records
from narvl_jax.errors import UserError
from narvl_jax.evaluation.tally import Tally
from tests.data.task_records import RECORDS, changed, make_vocabulary

NAN, INF = float("nan"), float("inf")
WRONG: list[tuple[str, Any]] = [
  *(("id", x) for x in (["a"], 5, {"a": 1}, None, b"a", True)),
  *(("kind", x) for x in (5, ["a"], {"a": 1}, None, 1.5)),
  *(("prompt", x) for x in (5, ["a"], None, b"a")),
  *(("premise", x) for x in (5, {"a": 1}, None)),
  *(("task", x) for x in (5, ["vqa"], {"vqa": 1}, "vq")),
  *(("objects", x) for x in ("abc", 5, {"a": 1}, [5], ["a", None], [["a"]])),
  *(("score", x) for x in (NAN, INF, "1", [1], True)),
  *(("annotators", x) for x in (-5, 1.5, "3", True, [1], None)),
  *(("people", x) for x in (5, "yes", [5], ["a", None], None)),
  *(("question_type", x) for x in (5, ["a"], None)),
  *(("box", x) for x in ("abcd", 5, {"a": 1}, [1, 2, 3], [1, 2, 3, NAN])),
  *(
    ("box", x) for x in ([0, 0, INF, 1], ["1", "2", "3", "4"], [1, 2, 3, True])
  ),
  *(("box", x) for x in ([[1], 2, 3, 4], [1, 2, 3, None])),
]
# Answers as a shard has them, and a part of the message.
WRONG_ANSWERS: list[tuple[list[Any], str]] = [
  ([["a", NAN]], "'a' has the score nan"),
  ([["a", 1.0], ["b", 5.0]], "'b' has the score 5.0"),
  ([["a", 1.0], ["b", -0.5]], "'b' has the score -0.5"),
  ([["a", "1"]], "'a' has the score '1'"),
  ([["a", True]], "'a' has the score True"),
  ([["a", None]], "'a' has the score None"),
  ([[5, 1.0]], "the answer 5; it must be a text"),
  ([["x" * 10_001, 1.0]], "10,001 characters, the limit is 10,000"),
]


def _stored(**changes: Any) -> bytes:
  record = changed("vqa", kind="color")
  fields = msgpack.unpackb(records.serialize(record)) | changes
  data = msgpack.packb(fields)
  assert data is not None
  return data


@pytest.mark.parametrize(("name", "value"), WRONG, ids=repr)
def test_field_of_a_wrong_type(name: str, value: Any) -> None:
  with pytest.raises(UserError, match=f'the field "{name}" is .*must be'):
    checked_record(changed("vqa", **{name: value}))
  # Absent where it is None.
  match = f'the field "{name}" is|the stored record has the task'
  if value is not None or name in ("id", "kind", "prompt", "premise"):
    with pytest.raises(UserError, match=match):
      records.deserialize(_stored(**{name: value}))


@pytest.mark.parametrize(("answers", "message"), WRONG_ANSWERS, ids=str)
def test_wrong_answers(answers: list[Any], message: str) -> None:
  with pytest.raises(UserError, match=message):
    checked_record(changed("vqa", answers=dict(answers)))
  with pytest.raises(UserError, match=message):
    records.deserialize(_stored(answers=answers))


def test_integers_beyond_all_floats() -> None:
  for change in (
    {"answers": {"a": 10**400}},
    {"box": (0, 0, 10**400, 1)},
    {"score": -(10**400)},
  ):
    with pytest.raises(UserError, match="must be"):
      checked_record(changed("vqa", **change))


@pytest.mark.parametrize("value", [None, {}, "record", object(), b""])
def test_no_record_at_all(value: Any) -> None:
  with pytest.raises(UserError, match="it must return a Record"):
    checked_record(value)


def test_image_and_answers_of_other_types() -> None:
  for name, value in (("image", "x.jpg"), ("image", None), ("answers", ["a"])):
    with pytest.raises(UserError, match=f'the field "{name}" is'):
      checked_record(changed("vqa", **{name: value}))


def test_numbers_of_numpy_pass() -> None:
  record = changed(
    "grounding",
    id=np.str_("a"),
    box=np.array([0, 25, 100, 100], np.float32),
    answers={np.str_("a"): np.float32(0.5), "b": np.float64(1), "c": 0},
    score=np.float32(-1.5),
    annotators=np.int64(3),
    objects=["dog", np.str_("cat")],
  )
  checked = checked_record(record)
  assert checked.box == (0.0, 25.0, 100.0, 100.0)
  assert checked.objects == ("dog", "cat")
  assert checked.answers is record.answers
  assert checked_record(changed("vqa", annotators=np.array(3))).annotators == 3


def test_a_good_record_is_passed_on_as_it_is() -> None:
  for record in RECORDS.values():
    assert checked_record(record) is record


def _source() -> list[Any]:
  good = [changed("vqa", id=f"good {i}", kind="color") for i in range(20)]
  bad = [changed("vqa", **{name: value}) for name, value in WRONG]
  bad += [changed("vqa", answers=dict(found)) for found, _ in WRONG_ANSWERS]
  return [*good, *bad, None, "record"]


def test_all_that_reads_records_leaves_them_out() -> None:
  """A user's source, which may return anything."""
  source = _source()
  reader = RecordReader(source, "x")
  for index in range(len(source)):
    found = reader.read(index, lambda record: record)
    assert isinstance(found, BadRecord) == (index >= 20), source[index]
    if isinstance(found, BadRecord):
      assert isinstance(found.kind, str)
      assert isinstance(found.record_id, str | None)
  task = tasks.make_task("vqa", make_vocabulary())
  figures = inspection.inspect(source, task, inspection.Limits())
  assert figures["bad"] == len(source) - 20
  json.dumps(figures)


def test_a_list_of_objects_can_be_encoded() -> None:
  """The prompt and the objects are the key of a cache."""
  task = tasks.make_task("vqa", make_vocabulary())
  record = changed("vqa", objects=["dog", "cat"])
  found = RecordReader([record], "x").read(0, task.encode)
  assert found == task.encode(RECORDS["vqa"])


def test_the_evaluator_groups_what_is_left() -> None:
  """A kind that is not a text cannot be the key of a group."""
  found = [
    RecordReader([record], "x").read(0, lambda record: record.kind)
    for record in _source()
  ]
  kinds = [kind for kind in found if not isinstance(kind, BadRecord)]
  tally = Tally()
  tally.predictions = {i: {"kind": kind} for i, kind in enumerate(kinds)}
  groups = tally._group(tally.predictions, "kind")
  assert list(groups) == ["color"]


def test_records_are_checked_where_a_defect_is_looked_for() -> None:
  """Records that are tried for a defect are checked as well."""
  source = [changed("vqa", objects=["dog"]) for _ in range(3)]

  def use(record: Record) -> None:
    assert record.objects == ("dog",)
    raise TypeError("odd")

  with pytest.raises(TypeError, match="odd"):
    RecordReader(source, "x").read(0, use)


def test_equal_after_storing() -> None:
  record = dataclasses.replace(
    changed("vqa", box=(1.0, 2.0, 3.0, 4.0), score=-0.5, annotators=3),
    image=b"x",
  )
  assert records.deserialize(records.serialize(record)) == record
