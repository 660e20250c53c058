"""Segments of shared memory for pictures: taken, fetched, freed, given back."""

import collections
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from narvl_jax.data import shared_images
from narvl_jax.data.shared_images import Segments, WorkerSegments
from narvl_jax.errors import UserError

SHAPE = (2, 3, 4, 3)
BYTES = 2 * 3 * 4 * 3


def _fill(worker: WorkerSegments, value: int) -> shared_images.SharedImages:
  taken = worker.take(SHAPE)
  assert taken is not None
  taken[1][...] = value
  # What is sent is a name and a shape only.
  return pickle.loads(pickle.dumps(taken[0]))


def test_pictures_arrive_and_segments_are_used_again() -> None:
  segments = Segments(2, 2, BYTES)
  try:
    workers = [WorkerSegments(names) for names in segments.names]
    first, second = _fill(workers[0], 7), _fill(workers[0], 8)
    other = _fill(workers[1], 9)
    assert len({first.name, second.name, other.name}) == 3
    # None is free, which is no reason to wait.
    assert workers[0].take(SHAPE) is None
    fetched = segments.fetch(first)
    assert fetched.dtype == np.uint8
    again = _fill(workers[0], 5)
    assert again.name == first.name
    # A copy: what comes into the segment next does not show.
    assert (fetched == 7).all()
    assert fetched.shape == SHAPE
    assert (segments.fetch(second) == 8).all()
    assert (segments.fetch(other) == 9).all()
    assert (segments.fetch(again) == 5).all()
  finally:
    segments.close()


def test_a_segment_that_is_not_sent_is_freed() -> None:
  segments = Segments(1, 1, BYTES)
  try:
    worker = WorkerSegments(segments.names[0])
    taken = worker.take(SHAPE)
    assert taken is not None
    assert worker.take(SHAPE) is None
    worker.free(taken[0])
    assert worker.take(SHAPE) is not None
  finally:
    segments.close()


def test_larger_pictures_find_no_segment() -> None:
  segments = Segments(1, 1, BYTES)
  try:
    worker = WorkerSegments(segments.names[0])
    # The system gives whole pages.
    assert worker.take((1000, 3, 4, 3)) is None
  finally:
    segments.close()


@pytest.mark.skipif(
  not pathlib.Path("/dev/shm").is_dir(), reason="no /dev/shm on this system"
)
def test_closing_gives_the_memory_back() -> None:
  segments = Segments(2, 3, BYTES)
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
    Segments(4, 5, 100_000_000)


def test_systems_without_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(shared_images, "_FOLDER", os.devnull + "/none")
  Segments(1, 1, BYTES).close()
