"""A file and a cache folder of each test's own."""

import pathlib

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  """A cache folder of the test's own."""
  folder = tmp_path / "cache"
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  return folder / "narvl_jax"


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
  (tmp_path / "data").mkdir()
  return tmp_path / "data" / "rows.tsv"
