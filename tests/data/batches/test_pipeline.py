"""Pipeline: shapes, determinism, resuming, bad records."""

import itertools
import logging
from typing import Any

import numpy as np
import pytest

from narvl_jax.data.batches import pipeline
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError
from tests.data.number_source import H, L, NumberSource, T, W, make_tasks
from tests.support.batches import train_batches


@pytest.fixture(scope="module")
def model_tasks() -> dict[str, Any]:
  return make_tasks()


def _entries(count: int = 50) -> list[Any]:
  schedule = ((0, 1.0), (3, 2.0))
  return [
    MixtureEntry(
      NumberSource(name, count + i), name, schedule if i else 1.0, name
    )
    for i, name in enumerate(TASKS)
  ]


def _train(
  model_tasks: dict[str, Any], entries: list[Any] | None = None, **changes: Any
) -> pipeline.TrainBatches:
  settings: dict[str, Any] = {
    "batch_size": 12,
    "seed": 5,
    "position": 0,
    "image_size": (H, W),
    "max_text_length": T,
    "max_label_length": L,
    "num_threads": 0,
    **changes,
  }
  return train_batches(
    _entries() if entries is None else entries, model_tasks, **settings
  )


def _take(batches: pipeline.TrainBatches, count: int) -> list[Any]:
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def _assert_equal(a: list[Any], b: list[Any]) -> None:
  assert len(a) == len(b) > 0
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def test_shapes_and_types(model_tasks: dict[str, Any]) -> None:
  (batch,) = _take(_train(model_tasks), 1)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    "image": ((12, H, W, 3), "uint8"),
    "image_mask": ((12,), "bool"),
    "text": ((12, T), "int32"),
    "labels": ((12, L), "int32"),
    "label_length": ((12,), "int32"),
    "confidence": ((12,), "float32"),
    "task": ((12,), "int32"),
    "index": ((12,), "int64"),
    "valid": ((12,), "bool"),
  }
  assert batch["valid"].all()
  assert batch["image_mask"].all()


def test_rows_contain_their_records(model_tasks: dict[str, Any]) -> None:
  batches = _take(_train(model_tasks), 4)
  sources = {name: NumberSource(name, 53) for name in TASKS}
  for batch in batches:
    for row in range(12):
      name = TASKS[batch["task"][row]]
      index = int(batch["index"][row])
      record = sources[name][index]
      encoded = model_tasks[name].encode(record)
      n, m = len(encoded.text_ids), len(encoded.label_ids)
      assert (batch["image"][row] == index).all()
      assert batch["text"][row, :n].tolist() == encoded.text_ids
      assert (batch["text"][row, n:] == 1).all()
      assert batch["labels"][row, :m].tolist() == encoded.label_ids
      assert (batch["labels"][row, m:] == 1).all()
      assert batch["label_length"][row] == m
      assert batch["confidence"][row] == np.float32(encoded.confidence)
  assert {TASKS[i] for i in batches[0]["task"]} == set(TASKS)


@pytest.mark.parametrize("start", [0, 1, 4, 9])
def test_resume_is_exact(model_tasks: dict[str, Any], start: int) -> None:
  whole = _take(_train(model_tasks), 12)
  rest = _take(_train(model_tasks, position=start), 12 - start)
  _assert_equal(rest, whole[start:])


def test_resume_far_ahead(model_tasks: dict[str, Any]) -> None:
  a = _take(_train(model_tasks, position=10**7), 3)
  b = _take(_train(model_tasks, position=10**7 + 2), 1)
  _assert_equal(a[2:], b)
  assert (a[0]["index"] != b[0]["index"]).any()


def test_examples_of_a_batch_are_those_of_all_hosts(
  model_tasks: dict[str, Any],
) -> None:
  batches = _train(model_tasks)
  part = _train(model_tasks, rows=[3, 4])
  for position, batch in enumerate(_take(batches, 4)):
    examples = batches.examples(position)
    assert [index for _, index in examples] == batch["index"].tolist()
    names = [TASKS[i] for i in batch["task"]]
    assert [name for name, _ in examples] == names
    assert part.examples(position) == examples


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 2), (3, 8), (2, 0)])
def test_threads_do_not_matter(
  model_tasks: dict[str, Any], threads: int, prefetch: int
) -> None:
  plain = _take(_train(model_tasks), 9)
  changes = {"num_threads": threads, "prefetch": prefetch}
  _assert_equal(_take(_train(model_tasks, None, **changes), 9), plain)


def test_hosts_make_up_the_global_batch(model_tasks: dict[str, Any]) -> None:
  whole = _take(_train(model_tasks, position=2), 3)
  # Not each a run of rows, and two hosts that need the same ones.
  for rows in ([0, 1, 2, 3], [2, 3, 8, 9, 10], [8, 9, 11], [11]):
    part = _take(_train(model_tasks, None, position=2, rows=rows), 3)
    expected = [{key: x[rows] for key, x in batch.items()} for batch in whole]
    _assert_equal(part, expected)


def test_seed_matters(model_tasks: dict[str, Any]) -> None:
  a = _take(_train(model_tasks), 1)[0]
  b = _take(_train(model_tasks, seed=6), 1)[0]
  assert (a["index"] != b["index"]).any()


def _bad_entry(bad: dict[int, Any], count: int = 40) -> list[Any]:
  return [
    MixtureEntry(NumberSource("vqa", count, bad), "vqa", 1.0, "questions")
  ]


ALL_FAULTS = {
  3: "image",
  4: ValueError("torn row"),
  9: "prompt",
  17: "long prompt",
  24: "long answer",
  30: OSError("unreadable"),
  31: KeyError("column"),
  39: "no answer",
}


def test_bad_records_are_replaced(
  model_tasks: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
  counter = pipeline.BadRecords(max_fraction=0.5)
  with caplog.at_level(logging.WARNING, logger="absl"):
    batches = _take(
      _train(model_tasks, _bad_entry(ALL_FAULTS), bad_records=counter), 20
    )
  good = _take(_train(model_tasks, _bad_entry({})), 20)
  for batch, expected in zip(batches, good, strict=True):
    for row in range(12):
      index = int(expected["index"][row])
      while index in ALL_FAULTS:
        index = (index + 1) % 40
      assert batch["index"][row] == index
      assert (batch["image"][row] == index).all()
  # Six epochs, yet each is reported once.
  assert counter.count == len(ALL_FAULTS)
  messages = [record.getMessage() for record in caplog.records]
  assert len(messages) == len(ALL_FAULTS)
  (torn,) = [m for m in messages if "record 4:" in m]
  assert torn == "skipped a bad record of questions: record 4: torn row"
  (image,) = [m for m in messages if "record 3 " in m]
  assert 'a bad record of questions: record 3 (id "vqa3"): the image' in image
  assert "no known format" in image
  again = _train(
    model_tasks,
    _bad_entry(ALL_FAULTS),
    bad_records=pipeline.BadRecords(0.5),
    position=7,
    num_threads=2,
  )
  _assert_equal(_take(again, 13), batches[7:])


@pytest.mark.parametrize("threads", [0, 2])
def test_too_many_bad_records(
  model_tasks: dict[str, Any], threads: int
) -> None:
  entries = _bad_entry({i: "prompt" for i in (2, 5, 7)}, count=100)
  limits = {0.01: False, 0.03: True}
  for limit, passes in limits.items():
    counter = pipeline.BadRecords(limit)
    batches = _train(
      model_tasks, entries, bad_records=counter, num_threads=threads
    )
    if passes:
      assert len(_take(batches, 10)) == 10
      assert counter.count == 3
      continue
    message = (
      r"2 of 100 records of questions are bad, more than 1.00%; the last is"
      r" record \d \(id \"vqa\d\"\): the prompt .*"
      "--config.data.max_bad_fraction"
    )
    with pytest.raises(UserError, match=message) as error:
      _take(batches, 10)
    assert "\n" not in str(error.value)


def test_nothing_but_bad_records(model_tasks: dict[str, Any]) -> None:
  entries = _bad_entry(dict.fromkeys(range(40), "image"))
  batches = _train(model_tasks, entries, bad_records=pipeline.BadRecords(1.0))
  with pytest.raises(UserError, match="40 records of questions in a row"):
    next(batches)


def test_defects_are_not_counted_as_bad_records(
  model_tasks: dict[str, Any],
) -> None:
  entries = _bad_entry({i: TypeError("a defect") for i in range(40)})
  with pytest.raises(TypeError, match="a defect"):
    next(_train(model_tasks, entries))


@pytest.mark.parametrize(
  ("fault", "message"),
  [
    (
      "long prompt",
      r"prompt of vqa record \"vqa2\" has 43 tokens with bos and eos, the"
      r" limit is 24; .*--config.data.max_text_length=43",
    ),
    (
      "long answer",
      r"target of vqa record \"vqa2\" has 41 labels, the limit is 9;"
      r" set --config.data.max_label_length=41",
    ),
  ],
)
def test_lengths_are_checked(
  model_tasks: dict[str, Any], fault: str, message: str
) -> None:
  batcher = pipeline.Batcher((H, W), T, L)
  batch = batcher.empty(1)
  record = NumberSource("vqa", 5, {2: fault})[2]
  with pytest.raises(UserError, match=message):
    batcher.write(batch, 0, record, model_tasks["vqa"])
  # Nothing of it was written.
  _assert_equal([batch], [batcher.empty(1)])


def test_predict_needs_no_target(model_tasks: dict[str, Any]) -> None:
  batcher = pipeline.Batcher((H, W), T, L)
  batch = batcher.empty(1)
  record = NumberSource("vqa", 5, {2: "no answer"})[2]
  batcher.write(batch, 0, record, model_tasks["vqa"], target="none")
  assert batch["label_length"][0] == 0
  assert (batch["text"][0] != 1).sum() > 3
