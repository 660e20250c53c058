"""Shards are written to stores and read from them."""

import pathlib
import pickle
import re
import shutil
from concurrent import futures
from typing import Any

import pytest

from narvl_jax.data.shards import conversion, writer
from narvl_jax.data.shards.manifest import verify
from narvl_jax.data.sources import open_source
from narvl_jax.errors import UserError
from narvl_jax.files import store_cache
from narvl_jax.files.stores import as_path
from tests.stores.servers import Store

# A request for the content of a shard.
_CONTENT = re.compile(r"GET /(download|bucket-\d+/).*array_record")


@pytest.fixture(autouse=True)
def cache(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
  """Makes a cache of its own for the test."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "narvl_jax" / "stores"


@pytest.fixture(params=["gcs", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
  return request.getfixturevalue(request.param)


@pytest.fixture
def folder(store: Store) -> Any:
  return as_path(f"{store.make_bucket()}/shards")


def _convert(folder: Any, **options: Any) -> Any:
  options = {"limit": 10, "shards": 3, **options}
  job, origin = conversion.plan(
    "shapes", str(folder), task="vqa", split="test", **options
  )
  return conversion.convert(job, origin, log=lambda line: None)


@pytest.mark.parametrize("format", ["array_record", "tsv"])
def test_a_folder_in_a_store_equals_a_local_one(
  folder: Any, tmp_path: pathlib.Path, format: str
) -> None:
  local = _convert(tmp_path / "local", format=format)
  assert _convert(folder, format=format).shards == local.shards
  names = {path.name for path in folder.iterdir()}
  assert names == {path.name for path in (tmp_path / "local").iterdir()}
  if format == "array_record":
    source: Any = open_source(str(folder))
    assert list(source) == list(open_source(str(tmp_path / "local")))
    assert source.locate(9).startswith(f"{folder}/")
    assert pickle.loads(pickle.dumps(source))[9] == source[9]
  assert not verify(folder)
  # A repeated command finds everything.
  assert _convert(folder, format=format).shards == local.shards


def test_a_conversion_resumes(
  folder: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
  write = writer.write_shard
  written: list[int] = []

  def failing(source: Any, job: Any, number: int) -> Any:
    if len(written) == 2:
      raise UserError("stopped")
    written.append(number)
    return write(source, job, number)

  monkeypatch.setattr(writer, "write_shard", failing)
  with pytest.raises(UserError, match="stopped"):
    _convert(folder)
  assert not (folder / "manifest.json").exists()
  monkeypatch.setattr(
    writer, "write_shard",
    lambda source, job, number: written.append(number)
    or write(source, job, number),
  )  # fmt: skip
  assert _convert(folder).records == 10
  assert sorted(written) == [0, 1, 2]
  assert not list((folder / ".convert").rglob("*"))
  with pytest.raises(UserError, match="was begun with"):
    _convert(folder, limit=9)


def test_damage_is_found(folder: Any) -> None:
  _convert(folder)
  shard = min(folder.glob("*.array_record"))
  data = shard.read_bytes()
  shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  assert "changed" in verify(folder)[0]
  shard.write_bytes(data[:-1])
  with pytest.raises(UserError, match="truncated"):
    open_source(str(folder))
  shard.unlink()
  with pytest.raises(UserError, match="missing"):
    open_source(str(folder))


def test_shards_are_copied_once(
  folder: Any, store: Store, cache: pathlib.Path
) -> None:
  _convert(folder)
  source: Any = open_source(str(folder))
  store.faults.requests.clear()
  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(source.__getitem__, [*range(10)] * 3))
  list(open_source(str(folder)))
  contents = [x for x in store.faults.requests if _CONTENT.match(x)]
  assert len(contents) == 3
  assert len(list(cache.rglob("*.array_record"))) == 3


def test_the_cache_must_hold_the_shards(
  folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  _convert(folder)
  monkeypatch.setenv(store_cache.VARIABLE, "1e-6")
  with pytest.raises(
    UserError, match=r"GB, which are copied.*CACHE_GB to more"
  ):
    open_source(str(folder))
  monkeypatch.setenv(store_cache.VARIABLE, "much")
  with pytest.raises(UserError, match="CACHE_GB=much is not a number"):
    open_source(str(folder))


def test_the_cache_removes_what_was_not_used(
  store: Store, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  bucket = as_path(store.make_bucket())
  monkeypatch.setenv(store_cache.VARIABLE, str(10_000 / 1e9))
  monkeypatch.setattr(store_cache, "_unchecked", 0)
  files = [bucket / f"{i}.jpg" for i in range(20)]
  for number, file in enumerate(files):
    file.write_bytes(bytes([number]) * 900)
    assert store_cache.read_bytes(file, 1000) == bytes([number]) * 900
    # Used again and again.
    store_cache.read_bytes(files[0], 1000)
  copies = list(cache.rglob("*.jpg"))
  assert 5 <= len(copies) <= 11
  contents = [path.read_bytes() for path in copies]
  assert b"\0" * 900 in contents
  assert b"\1" * 900 not in contents
  assert store_cache.read_bytes(files[1], 1000) == b"\1" * 900
  with pytest.raises(OSError, match="900 bytes, the limit is 800"):
    store_cache.read_bytes(files[1], 800)
  shutil.rmtree(cache)
  monkeypatch.setenv(store_cache.VARIABLE, "0")
  assert store_cache.read_bytes(files[1], 1000) == b"\1" * 900
  assert not cache.exists()
