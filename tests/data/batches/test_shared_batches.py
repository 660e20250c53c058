"""Segments of shared memory for batches: taken, fetched, freed, closed."""

import collections
import os
import pathlib
import pickle
import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from narvl_jax.data.batches import shared_batches
from narvl_jax.data.batches.shared_batches import Segments, WorkerSegments
from narvl_jax.errors import UserError

ARRAYS = {
  "text": np.arange(5, dtype=np.int32),
  "image": np.zeros((2, 3, 4, 3), np.uint8),
  "confidence": np.full((2, 1), 0.5, np.float32),
  "valid": np.array([True, False]),
}
LAYOUT = {key: (x.dtype.str, x.shape) for key, x in ARRAYS.items()}


@pytest.fixture
def segments() -> Iterator[Segments]:
  made = Segments(2, 2, LAYOUT)
  yield made
  made.close()


def _fill(worker: WorkerSegments, value: int) -> shared_batches.SharedBatch:
  taken = worker.take()
  assert taken is not None
  sent, arrays = taken
  assert arrays.keys() == ARRAYS.keys()
  for key, array in arrays.items():
    array[...] = value if key == "image" else ARRAYS[key]
  # A message that fits into one write to a pipe.
  message = pickle.dumps(sent)
  assert len(message) < 4096
  return pickle.loads(message)


def test_arrays_arrive_and_segments_are_used_again(segments: Segments) -> None:
  workers = [WorkerSegments(names, LAYOUT) for names in segments.names]
  first, second = _fill(workers[0], 7), _fill(workers[0], 8)
  other = _fill(workers[1], 9)
  assert len({x.segment for x in (first, second, other)}) == 3
  # None is free, which is no reason to wait.
  assert workers[0].take() is None
  fetched = segments.fetch(first)
  again = _fill(workers[0], 5)
  assert again.segment == first.segment
  # A copy: what comes into the segment next does not show.
  assert fetched.keys() == ARRAYS.keys()
  for key, array in ARRAYS.items():
    assert fetched[key].dtype == array.dtype
    expected = np.full_like(array, 7) if key == "image" else array
    np.testing.assert_array_equal(fetched[key], expected)
  assert (segments.fetch(second)["image"] == 8).all()
  assert (segments.fetch(other)["image"] == 9).all()
  assert (segments.fetch(again)["image"] == 5).all()


def test_a_segment_that_is_not_sent_is_freed(segments: Segments) -> None:
  worker = WorkerSegments(segments.names[0][:1], LAYOUT)
  taken = worker.take()
  assert taken is not None
  assert worker.take() is None
  worker.free(taken[0])
  assert worker.take() is not None


@pytest.mark.skipif(
  not pathlib.Path("/dev/shm").is_dir(), reason="no /dev/shm on this system"
)
def test_closing_gives_the_memory_back() -> None:
  segments = Segments(2, 3, LAYOUT)
  names = [name for own in segments.names for name in own]
  files = [pathlib.Path("/dev/shm") / name for name in names]
  assert len(names) == 6
  assert all(file.exists() for file in files)
  segments.close()
  assert not any(file.exists() for file in files)
  segments.close()


def test_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
  usage = collections.namedtuple("usage", "free")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(64_000_000))
  with pytest.raises(
    UserError,
    match=r"may need 2000 MB of shared memory, /dev/shm has 64 MB free: .*"
    r"--shm-size.* --config.data.num_workers or --config.data.prefetch",
  ):
    Segments(4, 5, {"image": ("|u1", (100, 1000, 1000))})


def test_systems_without_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(shared_batches, "_FOLDER", os.devnull + "/none")
  segments = Segments(1, 2, LAYOUT)
  assert len(segments.names[0]) == 2
  segments.close()
