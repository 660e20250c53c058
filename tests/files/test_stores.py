"""Files in stores behave as local ones where they can."""

import importlib.util
import os
import pathlib

import pytest

from narvl_jax.errors import UserError
from narvl_jax.files import disk, leftovers, paths, side_files
from narvl_jax.files.disk_errors import explain_disk
from narvl_jax.files.regular import (
  UnusableFile,
  is_regular,
  open_regular,
  read_regular,
  sha256_of,
)
from narvl_jax.files.schemes import StoreError
from narvl_jax.files.stores import as_path, is_remote
from tests.stores.servers import Store


@pytest.fixture(params=["gcs", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
  return request.getfixturevalue(request.param)


@pytest.fixture
def run(store: Store) -> pathlib.Path:
  return as_path(f"{store.make_bucket()}/run")


def test_local_paths_stay_paths(tmp_path: pathlib.Path) -> None:
  assert as_path(str(tmp_path)) == tmp_path
  assert as_path(tmp_path) is tmp_path
  assert type(as_path("a/b")) is type(tmp_path)
  assert not is_remote(tmp_path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("gs:/bucket/run", r"is not a path in a bucket; write gs://bucket/run"),
    ("s3:bucket", r"write s3://bucket"),
    ("az://box/run", r"az:// cannot be read.* Valid are local paths and gs://"),
    ("gcs://b/run", r'cannot be read. Did you mean "gs://"'),
    ("gs://", r"names no bucket; give gs://BUCKET/FOLDER"),
  ],
)
def test_other_addresses_are_rejected(text: str, message: str) -> None:
  with pytest.raises(UserError, match=message):
    as_path(text)
  with pytest.raises(UserError, match=rf'--workdir="{text}.*{message}'):
    paths.check_folder("--workdir", text)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  message = r"gs:// needs the package gcsfs; install it: pip install.*\[gcs\]"
  with pytest.raises(UserError, match=message):
    paths.check_possible("--workdir", "gs://bucket/run")


def test_names_are_those_of_a_path(run: pathlib.Path) -> None:
  place = run / "checkpoints" / "10"
  assert is_remote(place)
  assert str(place) == os.fspath(place) == f"{run}/checkpoints/10"
  assert place.parent.parent == run
  assert place.with_name("11").name == "11"
  assert place.relative_to(run).as_posix() == "checkpoints/10"
  assert as_path(place) == place
  assert place.resolve() == place.absolute() == place


def test_a_file_is_written_listed_and_removed(run: pathlib.Path) -> None:
  assert not run.exists()
  assert not list(run.glob("*"))
  disk.write_text(run / "a" / "x.txt", "one")
  disk.append(run / "a" / "x.txt", b" two")
  assert (run / "a" / "x.txt").read_text() == "one two"
  assert run.is_dir()
  assert (run / "a").is_dir()
  assert (run / "a" / "x.txt").stat().st_size == 7
  assert [x.name for x in run.iterdir()] == ["a"]
  assert disk.files_below(run) == ["a/x.txt"]
  assert list(run.glob("?/x*")) == [run / "a" / "x.txt"]
  assert (run / "a").rename(run / "b") == run / "b"
  assert disk.files_below(run) == ["b/x.txt"]
  leftovers.remove(run / "b")
  assert not run.exists()
  with pytest.raises(FileNotFoundError):
    (run / "b" / "x.txt").read_bytes()
  with pytest.raises(FileNotFoundError):
    (run / "b").stat()


def test_a_failed_write_leaves_the_old_file(run: pathlib.Path) -> None:
  disk.write_text(run / "x", "old")
  with pytest.raises(KeyError), disk.atomically(run / "x") as temporary:
    temporary.write_text({}["new"])
  assert (run / "x").read_text() == "old"


def test_a_file_is_read_up_to_a_limit(run: pathlib.Path) -> None:
  (run / "x").write_bytes(b"0123456789")
  assert read_regular(run / "x") == b"0123456789"
  with open_regular(run / "x") as file:
    file.seek(4)
    assert file.read(2) == b"45"
  with pytest.raises(UnusableFile, match="10 bytes, the limit is 5"):
    read_regular(run / "x", 5)
  assert is_regular(run / "x")
  assert not is_regular(run)
  assert len(sha256_of(run / "x")) == 64


def test_lines_are_appended_and_damaged_ones_set_aside(
  run: pathlib.Path,
) -> None:
  path = run / "lines.jsonl"
  side_files.append_line(path, {"a": 1})
  side_files.append_line(path, {"a": 2})
  path.write_bytes(path.read_bytes() + b"{broken\n")
  lines = side_files.repair_lines(path, lambda line: True)
  assert lines == [{"a": 1}, {"a": 2}]
  assert path.with_name("lines.jsonl.damaged").read_bytes() == b"{broken\n"
  path.write_bytes(b"[]")
  assert side_files.read_object(path) is None
  assert path.with_name("lines.jsonl.damaged.1").read_bytes() == b"[]"


def test_an_object_is_written_only_by_its_last_reader(
  run: pathlib.Path,
) -> None:
  from narvl_jax.files.store_path import StorePath

  lock = StorePath(run / "lock")
  assert lock.read_stored() is None
  assert lock.write_if(b"one", None)
  # A repeated request, whose first answer was lost, succeeds.
  assert lock.write_if(b"one", None)
  assert not lock.write_if(b"two", None)
  first = lock.read_stored()
  assert first is not None
  assert lock.write_if(b"three", first.version)
  assert not lock.write_if(b"four", first.version)
  assert lock.read_bytes() == b"three"


def test_a_folder_is_checked(store: Store, run: pathlib.Path) -> None:
  paths.check_folder("--workdir", str(run))
  assert not run.exists()
  (run / "file").write_bytes(b"")
  with pytest.raises(UserError, match=r"run/file is a file, not a folder"):
    paths.check_folder("--workdir", run / "file")
  with pytest.raises(UserError, match="is a folder; give a file in it"):
    paths.check_file("--to", str(run))
  paths.check_file("--to", f"{run}/new")
  message = f"--workdir={store.scheme}://none-such/run: there is no bucket none"
  with pytest.raises(UserError, match=message):
    paths.check_folder("--workdir", f"{store.scheme}://none-such/run")


@pytest.mark.parametrize(
  ("status", "message"),
  [(403, r"no permission"), (400, "the store failed")],
)
def test_errors_of_a_store_are_one_line(
  store: Store, run: pathlib.Path, status: int, message: str
) -> None:
  store.faults.fail(run.parent.name, status, times=100)
  with pytest.raises(StoreError, match=message) as error:
    run.exists()
  line = explain_disk(error.value)
  assert line is not None
  assert line.startswith(f"{run} cannot be written or read: {message}")
  with pytest.raises(UserError, match=rf"--workdir={run}: {message}"):
    paths.check_folder("--workdir", run)
  with pytest.raises(UserError, match=rf'cannot write "{run}/x": {message}'):
    disk.write_text(run / "x", "text")


def test_a_store_without_credentials_is_explained(
  store: Store, run: pathlib.Path
) -> None:
  if store.scheme == "s3":
    pytest.skip("the environment of the test has credentials")
  store.faults.fail("run", 401, times=100)
  with pytest.raises(StoreError, match=r"no valid credentials.*gcloud auth"):
    run.exists()
