"""Batches on the devices ahead of their use."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from narvl_jax.parallel import batch_sharding, make_mesh
from narvl_jax.run.batches import DeviceBatches, DevicePrefetcher


def _batch(i: int) -> dict[str, np.ndarray]:
  rows = np.arange(8 * i, 8 * i + 8, dtype=np.int32)
  return {"rows": rows, "host only": rows}


def _endless(made: list[int]):
  for i in itertools.count():
    made.append(i)
    yield _batch(i)


def test_batches_come_in_order_and_lie_on_the_mesh():
  mesh = make_mesh()
  with DevicePrefetcher(_endless([]), mesh, ("rows",)) as batches:
    for i in range(5):
      batch = batches.get()
      assert list(batch) == ["rows"]
      assert batch["rows"].sharding == batch_sharding(mesh)
      assert [len(s.data) for s in batch["rows"].addressable_shards] == [1] * 8
      np.testing.assert_array_equal(batch["rows"], _batch(i)["rows"])


def test_works_ahead_but_not_without_limit():
  made: list[int] = []
  with DevicePrefetcher(
    _endless(made), make_mesh(), ("rows",), depth=2
  ) as batches:
    batches.get()
    while not batches.ready:
      time.sleep(0.001)
    batches.get()
    # Taken two, two wait, one is made and waits for a place.
    assert len(made) <= 5


def test_end_of_the_batches():
  with DevicePrefetcher(iter([_batch(0)]), make_mesh(), ("rows",)) as batches:
    batches.get()
    with pytest.raises(StopIteration):
      batches.get()


def test_errors_travel_to_the_user_of_the_batches():
  def failing():
    yield _batch(0)
    raise OSError("the disk is gone")

  with DevicePrefetcher(failing(), make_mesh(), ("rows",)) as batches:
    assert isinstance(batches.get()["rows"], jax.Array)
    with pytest.raises(OSError, match="the disk is gone"):
      batches.get()


def test_missing_array_is_an_error_too():
  with (
    DevicePrefetcher(iter([_batch(0)]), make_mesh(), ("image",)) as batches,
    pytest.raises(KeyError, match="image"),
  ):
    batches.get()


def test_close_ends_the_thread_though_the_queue_is_full():
  before = threading.active_count()
  batches = DevicePrefetcher(_endless([]), make_mesh(), ("rows",), depth=1)
  while not batches.ready:
    time.sleep(0.001)
  assert threading.active_count() == before + 1
  batches.close()
  assert threading.active_count() == before


class _Source:
  """Stands in for `TrainBatches`."""

  def __init__(self, position: int) -> None:
    self.next = position
    self.closed = 0

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    assert not self.closed
    self.next += 1
    return _batch(self.next - 1)

  def close(self) -> None:
    self.closed += 1


def test_batches_from_any_position():
  opened: list[_Source] = []

  def open_batches(position: int) -> Any:
    opened.append(_Source(position))
    return opened[-1]

  with DeviceBatches(open_batches, 3, make_mesh(), ("rows",), 8) as batches:
    for position in (3, 4):
      assert batches.position == position
      np.testing.assert_array_equal(
        batches.get()["rows"], _batch(position)["rows"]
      )
    # Also backwards; what was ready already is forgotten.
    for start in (9, 1):
      batches.seek(start)
      for position in (start, start + 1):
        assert batches.position == position
        np.testing.assert_array_equal(
          batches.get()["rows"], _batch(position)["rows"]
        )
  assert [source.closed for source in opened] == [1, 1, 1]


def test_ctrl_c_does_not_reach_processes_that_prepare_batches():
  """They inherit the mask of the thread, also while they import."""
  program = (
    "import signal, sys, time; print('begun', flush=True); time.sleep(60)"
  )
  found = []

  def batches():
    with subprocess.Popen(
      [sys.executable, "-c", program],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    ) as child:
      assert child.stdout is not None
      child.stdout.readline()
      os.kill(child.pid, signal.SIGINT)
      time.sleep(0.2)
      found.append(child.poll())
      child.kill()
      found.append(child.communicate()[1])
    yield _batch(0)

  with DevicePrefetcher(batches(), make_mesh(), ("rows",)) as prefetcher:
    prefetcher.get()
  assert found == [None, ""]
