"""Evaluation batches: every record once, padding, bad records."""

from typing import Any

import pytest

from narvl_jax.data.batches import pipeline
from narvl_jax.data.example import Record
from narvl_jax.errors import UserError
from tests.data.number_source import H, L, NumberSource, T, W, make_tasks
from tests.support.batches import eval_batches


@pytest.fixture(scope="module")
def model_tasks() -> dict[str, Any]:
  return make_tasks()


def _evaluate(
  model_tasks: dict[str, Any], source: Any, **changes: Any
) -> list[tuple[pipeline.Batch, list[Record]]]:
  settings = {
    "batch_size": 4,
    "image_size": (H, W),
    "max_text_length": T,
    "max_label_length": L,
    **changes,
  }
  task = model_tasks[source.task]
  return list(eval_batches(source, task, **settings))


@pytest.mark.parametrize("count", [1, 4, 11, 12])
@pytest.mark.parametrize("threads", [0, 2])
def test_evaluation_covers_each_record_once(
  model_tasks: dict[str, Any], count: int, threads: int
) -> None:
  source = NumberSource("vqa", count)
  batches = _evaluate(model_tasks, source, num_threads=threads)
  assert len(batches) == -(-count // 4)
  seen = []
  for batch, records in batches:
    assert batch["image"].shape == (4, H, W, 3)
    valid = batch["valid"]
    assert valid.dtype == bool
    assert valid.tolist() == [i < len(records) for i in range(4)]
    for row, record in enumerate(records):
      assert record.id == f"vqa{batch['index'][row]}"
      assert (batch["image"][row] == batch["index"][row]).all()
    for key in batch.keys() - {"valid"}:
      assert (batch[key][~valid] == batch[key][0]).all()
    seen += batch["index"][valid].tolist()
  assert seen == list(range(count))
  assert sorted(source.reads) == list(range(count))


def test_sources_of_few_records(model_tasks: dict[str, Any]) -> None:
  batches = _evaluate(model_tasks, NumberSource("caption", 5))
  assert [len(records) for _, records in batches] == [4, 1]
  with pytest.raises(UserError, match=r"no record to evaluate in .evaluation"):
    _evaluate(model_tasks, NumberSource("caption", 0))


def test_evaluation_leaves_bad_records_out(
  model_tasks: dict[str, Any],
) -> None:
  bad = {0: "image", 5: ValueError("torn"), 6: "long prompt"}
  counter = pipeline.BadRecords(0.5)
  batches = _evaluate(
    model_tasks, NumberSource("vqa", 8, bad), bad_records=counter
  )
  assert counter.count == 3
  indices = [b["index"][b["valid"]].tolist() for b, _ in batches]
  assert indices == [[1, 2, 3], [4, 7]]
  assert [r.id for _, rs in batches for r in rs] == [
    f"vqa{i}" for i in (1, 2, 3, 4, 7)
  ]
  with pytest.raises(UserError, match="1 of 8 records of dev are bad"):
    _evaluate(model_tasks, NumberSource("vqa", 8, bad), name="dev")


def test_evaluation_of_a_batch_without_good_records(
  model_tasks: dict[str, Any],
) -> None:
  source = NumberSource("vqa", 6, dict.fromkeys(range(4), "image"))
  counter = pipeline.BadRecords(1.0)
  (first, none), (_, rest) = _evaluate(model_tasks, source, bad_records=counter)
  assert none == []
  assert not first["valid"].any()
  assert len(rest) == 2


def test_evaluation_needs_no_usable_target(
  model_tasks: dict[str, Any],
) -> None:
  source = NumberSource("vqa", 4, {1: "no answer", 2: "long answer"})
  ((batch, records),) = _evaluate(model_tasks, source)
  assert len(records) == 4
  assert batch["label_length"].tolist() == [2, 0, 0, 2]
  assert (batch["labels"][1:3] == 1).all()


@pytest.mark.parametrize("rows", [[0, 1], [1, 3], [3]])
def test_hosts_share_the_records(
  model_tasks: dict[str, Any], rows: list[int]
) -> None:
  source = NumberSource("vqa", 9, {5: "image"})
  batches = _evaluate(
    model_tasks, source, rows=rows, bad_records=pipeline.BadRecords(0.5)
  )
  # As many batches as the other hosts have, whether or not any row is left.
  assert len(batches) == 3
  for start, (batch, records) in zip((0, 4, 8), batches, strict=True):
    own = [start + row for row in rows if start + row < 9]
    good = [index for index in own if index != 5]
    assert len(batch["index"]) == len(rows)
    assert batch["index"][batch["valid"]].tolist() == good
    assert [record.id for record in records] == [f"vqa{i}" for i in good]
  assert set(source.reads) <= {i for i in range(9) if i % 4 in rows}
