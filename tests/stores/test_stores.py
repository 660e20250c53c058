"""The stand-ins for stores behave as stores do."""

import os
import time
from typing import Any

import fsspec
import pytest

from tests.stores.proxy import CUT
from tests.stores.servers import Store


@pytest.fixture(params=["gcs", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
  return request.getfixturevalue(request.param)


def _open(store: Store) -> tuple[Any, str]:
  bucket = store.make_bucket()
  return fsspec.filesystem(store.scheme), bucket


def test_files_are_written_listed_and_read(store: Store) -> None:
  system, bucket = _open(store)
  system.pipe_file(f"{bucket}/a/b.bin", b"0123456789")
  name = bucket.split("//")[1]
  assert system.find(bucket) == [f"{name}/a/b.bin"]
  assert system.cat_file(f"{bucket}/a/b.bin", start=2, end=5) == b"234"
  system.rm(f"{bucket}/a", recursive=True)
  assert not system.exists(f"{bucket}/a/b.bin")


@pytest.mark.parametrize(
  "data", [b"", b"\r", b"a\r\nb\r\n", bytes(range(256)) * 3, b"\n--=="]
)
def test_bytes_are_kept(store: Store, data: bytes) -> None:
  system, bucket = _open(store)
  system.pipe_file(f"{bucket}/a.bin", data)
  assert system.cat_file(f"{bucket}/a.bin") == data


def test_a_file_is_created_once(store: Store) -> None:
  system, bucket = _open(store)
  system.pipe_file(f"{bucket}/lock", b"one", mode="create")
  with pytest.raises(FileExistsError):
    system.pipe_file(f"{bucket}/lock", b"two", mode="create")
  assert system.cat_file(f"{bucket}/lock") == b"one"


@pytest.mark.parametrize("status", [429, 503, CUT])
def test_a_fault_ends(store: Store, status: int) -> None:
  system, bucket = _open(store)
  system.pipe_file(f"{bucket}/a.bin", b"0" * 1000)
  store.faults.fail("GET .*a.bin", status)
  assert system.cat_file(f"{bucket}/a.bin") == b"0" * 1000
  assert sum("GET" in x and "a.bin" in x for x in store.faults.requests) >= 2


def test_answers_are_delayed(store: Store) -> None:
  system, bucket = _open(store)
  store.faults.latency = 0.05
  start = time.monotonic()
  system.pipe_file(f"{bucket}/a.bin", b"0")
  assert time.monotonic() - start >= 0.05


def test_the_environment_is_set(store: Store) -> None:
  assert all(os.environ[k] == v for k, v in store.environment.items())
