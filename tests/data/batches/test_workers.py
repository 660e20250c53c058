"""Worker processes, and restoring the order of batches at any step.

A process takes seconds to start, so those tests that start many are slow ones.
"""

import itertools
import time
from typing import Any

import numpy as np
import pytest

from narvl_jax.data.batches import pipeline, shared_batches
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.errors import UserError
from tests.data.number_source import H, L, NumberSource, T, W, make_tasks
from tests.support.batches import train_batches

STEPS = 50
BATCH = 12
# Whether hosts own runs of rows or others.
HOSTS = {
  1: [range(12)],
  2: [range(6), range(6, 12)],
  4: [[0, 1, 2], [3, 4, 5], [6, 8, 10], [7, 9, 11]],
}
BAD = {3: "image", 8: "prompt", 30: ValueError("torn")}


@pytest.fixture(scope="module")
def model_tasks() -> dict[str, Any]:
  return make_tasks()


def _start(
  model_tasks: dict[str, Any], step: int, rows: Any, **settings: Any
) -> pipeline.TrainBatches:
  entries = [
    # Several epochs of the first within 50 steps, one and a bit of the second.
    MixtureEntry(NumberSource("vqa", 50, BAD), "vqa", 1.0, "questions"),
    MixtureEntry(
      NumberSource("grounding", 280), "grounding", ((0, 1.0), (20, 2)), "boxes"
    ),
  ]
  return train_batches(
    entries,
    model_tasks,
    batch_size=BATCH,
    seed=3,
    position=step,
    rows=list(rows),
    bad_records=pipeline.BadRecords(0.5),
    **{
      "image_size": (H, W),
      "max_text_length": T,
      "max_label_length": L,
      **settings,
    },
  )


def _read(
  model_tasks: dict[str, Any],
  start: int,
  stop: int,
  hosts: int,
  **settings: Any,
) -> list[dict[str, np.ndarray]]:
  """Returns the global batches that `hosts` hosts read together."""
  parts = []
  for rows in HOSTS[hosts]:
    batches = _start(model_tasks, start, rows, **settings)
    parts.append(list(itertools.islice(batches, stop - start)))
    batches.close()
  order = np.argsort(np.concatenate([list(rows) for rows in HOSTS[hosts]]))
  return [
    {
      key: np.concatenate([batch[key] for batch in batches])[order]
      for key in batches[0]
    }
    for batches in zip(*parts, strict=True)
  ]


@pytest.fixture(scope="module")
def whole(model_tasks: dict[str, Any]) -> list[dict[str, np.ndarray]]:
  """Batches of one host without workers, threads and resuming."""
  return _read(model_tasks, 0, STEPS, 1, num_threads=0)


def _assert_equal(a: list[Any], b: list[Any]) -> None:
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key], err_msg=key)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_restores_at_every_step(
  model_tasks: dict[str, Any], whole: list[Any], hosts: int
) -> None:
  for start in range(STEPS + 1):
    rest = _read(model_tasks, start, STEPS, hosts, num_threads=start % 3)
    _assert_equal(rest, whole[start:])


@pytest.mark.slow
def test_restores_at_many_steps_with_workers(
  model_tasks: dict[str, Any], whole: list[Any]
) -> None:
  # Each number of workers divides some of the steps and not others; the test
  # above restores at all of them.
  for start in range(0, STEPS, 5):
    hosts = {15: 2, 30: 4}.get(start, 1)
    rest = _read(model_tasks, start, STEPS, hosts, num_workers=2)
    _assert_equal(rest, whole[start:])


def test_hosts_and_workers_may_change_on_the_way(
  model_tasks: dict[str, Any], whole: list[Any]
) -> None:
  stretches = [
    (0, 7, 1, {"num_workers": 2}),
    (7, 19, 4, {"num_threads": 0}),
    (19, 31, 2, {"num_workers": 1, "num_threads": 2}),
    (31, STEPS, 1, {"num_threads": 3}),
  ]
  read = []
  for start, stop, hosts, settings in stretches:
    read += _read(model_tasks, start, stop, hosts, **settings)
  _assert_equal(read, whole)


def test_every_epoch_has_each_record_once(whole: list[Any]) -> None:
  rows = [
    (int(t), int(i))
    for b in whole
    for t, i in zip(b["task"], b["index"], strict=True)
  ]
  boxes = [i for task, i in rows if task == 2]
  assert sorted(boxes[:280]) == list(range(280))
  questions = [i for task, i in rows if task == 1]
  assert len(questions) >= 4 * 50
  epochs = [questions[i : i + 50] for i in range(0, 200, 50)]
  # The next good record replaces a bad one.
  stand_ins = sorted([*(set(range(50)) - BAD.keys()), *(i + 1 for i in BAD)])
  for epoch in epochs:
    assert sorted(epoch) == stand_ins
  # A new order each time, far from the order of the file.
  assert len({tuple(epoch) for epoch in epochs}) == 4
  for epoch in epochs:
    assert abs(np.corrcoef(epoch, np.arange(50))[0, 1]) < 0.5


def test_bad_records_of_workers_are_counted(
  model_tasks: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
  batches = _start(model_tasks, 0, range(BATCH), num_workers=2)
  for _ in range(15):
    next(batches)
  counters = batches.counters(15)
  batches.close()
  assert batches.bad_records.count == len(BAD)
  assert len([r for r in caplog.records if "skipped a bad" in r.message]) == 3
  assert counters == {
    "questions/examples": 90,
    "questions/epochs": 90 / 50,
    "questions/bad": 3,
    "boxes/examples": 90,
    "boxes/epochs": 90 / 280,
    "boxes/bad": 0,
  }


def test_too_many_bad_records_stop_workers(model_tasks: dict[str, Any]) -> None:
  source = NumberSource("vqa", 150, dict.fromkeys(range(150), "image"))
  settings: dict[str, Any] = {
    "batch_size": 4,
    "seed": 0,
    "position": 0,
    "image_size": (H, W),
    "max_text_length": T,
    "max_label_length": L,
    "num_workers": 1,
  }
  entries = [MixtureEntry(source, "vqa", 1.0, "x")]
  for limit, message in (
    (0.01, r"2 of 150 records of x are bad, more than 1.00%"),
    (1.0, r"100 records of x in a row are bad, up to record \d+ .*Correct the"),
  ):
    batches = train_batches(
      entries, model_tasks, bad_records=pipeline.BadRecords(limit), **settings
    )
    with pytest.raises(UserError, match=message):
      next(batches)
    batches.close()


@pytest.mark.parametrize("count", [1, 12])
def test_segments_do_not_matter(
  model_tasks: dict[str, Any],
  whole: list[Any],
  count: int,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """With one segment some batches travel through grain's queue."""
  fetched = []
  fetch = pipeline.Segments.fetch

  def make(num_workers: int, _: int, layout: Any) -> Any:
    return shared_batches.Segments(num_workers, count, layout)

  def counting(self: Any, batch: Any) -> Any:
    fetched.append(batch)
    return fetch(self, batch)

  monkeypatch.setattr(pipeline, "Segments", make)
  monkeypatch.setattr(shared_batches.Segments, "fetch", counting)
  batches = _start(
    model_tasks, 0, range(BATCH), num_workers=1, num_threads=2, prefetch=3
  )
  first = next(batches)
  # Time for the worker to fill what it can.
  time.sleep(1.0)
  read = [first, *itertools.islice(batches, 19)]
  batches.close()
  _assert_equal(read, whole[:20])
  if count == 1:
    assert 1 <= len(fetched) < 20
  else:
    assert len(fetched) == 20
    assert len({batch.segment for batch in fetched}) < 20
