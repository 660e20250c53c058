"""Fixtures `gcs` and `s3`: a store with the environment that leads to it."""

import asyncio
import importlib.util
import os
from collections.abc import Iterator

import pytest

from tests.stores import servers

# Read when gcsfs is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
_NEEDED = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto")}


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[servers.Store]:
  """A GCS emulator for all tests of this process."""
  yield from _serve("gs")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[servers.Store]:
  """A moto server for all tests of this process."""
  yield from _serve("s3")


@pytest.fixture
def gcs(
  gcs_server: servers.Store, monkeypatch: pytest.MonkeyPatch
) -> Iterator[servers.Store]:
  """The emulator without faults; `gcs.make_bucket()` makes a bucket."""
  yield from _use(gcs_server, monkeypatch)


@pytest.fixture
def s3(
  s3_server: servers.Store, monkeypatch: pytest.MonkeyPatch
) -> Iterator[servers.Store]:
  """The moto server without faults; `s3.make_bucket()` makes a bucket."""
  yield from _use(s3_server, monkeypatch)


def _serve(scheme: str) -> Iterator[servers.Store]:
  for package in _NEEDED[scheme]:
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"the package {package} is absent")
  with servers.serving(scheme) as store:
    yield store


def _use(
  store: servers.Store, monkeypatch: pytest.MonkeyPatch
) -> Iterator[servers.Store]:
  for name, value in store.environment.items():
    monkeypatch.setenv(name, value)
  _forget_file_systems()
  store.faults.reset()
  yield store
  store.faults.reset()
  _forget_file_systems()


def _forget_file_systems() -> None:
  """Drops file systems that were made with another environment."""
  import fsspec
  from etils.epath import backend

  fsspec.AbstractFileSystem.clear_instance_cache()
  for scheme in ("gs", "s3"):
    if importlib.util.find_spec(_NEEDED[scheme][0]):
      fsspec.get_filesystem_class(scheme).clear_instance_cache()
  backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
  """Repeats failed requests at once."""
  sleep = asyncio.sleep
  monkeypatch.setattr(asyncio, "sleep", lambda seconds, *_: sleep(0))
