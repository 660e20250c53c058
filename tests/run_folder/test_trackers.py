"""Trackers: real ones offline, and services that fail."""

import json
import pathlib
import sqlite3
import struct
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest

from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.run_folder import services, trackers
from narvl_jax.run_folder.metrics import MetricsWriter
from tests.support.tiny import tiny_config


def _config(*names: str, **settings: str) -> Any:
  config = tiny_config()
  config.tracking.trackers = names
  config.tracking.update({"name": "tiny", **settings})
  return config


def _train(workdir: pathlib.Path, config: Any) -> None:
  """Writes what a run does that is killed after step 8 and resumed from 4."""
  image = workdir / "samples.png"
  PIL.Image.new("RGB", (4, 3)).save(image)
  writer = MetricsWriter(workdir, 0, config)
  for step in (2, 4):
    writer.write(step, {"train/loss": 1.0 / step, "nan": float("nan")})
  # The evaluation belongs to the same step.
  writer.write(4, {"validation/vqa/accuracy": 0.5})
  writer.flush()
  for step in (6, 8):
    writer.write(step, {"train/loss": 1.0 / step})
  writer.flush()
  writer.close(failed=True)
  with MetricsWriter(workdir, 4, config) as writer:
    for step in (6, 8):
      writer.write(step, {"train/loss": 9.0})
      writer.write(step, {f"validation/{step}/accuracy": 0.75})
    writer.write(10, {"train/loss": 0.1})
    writer.go_back(6)
    for step in (8, 10):
      writer.write(step, {"train/loss": 9.0})
    writer.write_image(10, "samples", image)


_EXPECTED = [
  (2, "train/loss", 0.5),
  (4, "train/loss", 0.25),
  (4, "validation/vqa/accuracy", 0.5),
  (6, "train/loss", 1 / 6),
  (8, "train/loss", 0.125),
  # The kill came before this evaluation.
  (8, "validation/8/accuracy", 0.75),
  (10, "train/loss", 0.1),
]


class _Fake:
  """A service in memory; `opened` and `sent` of all instances."""

  opened: list[tuple[str, str]]
  sent: list[tuple[int, str, Any]]
  closed: list[bool]
  failing = ""

  def __init__(self, run_id: str, name: str, workdir: Any, config: Any):
    self._fail("open")
    self.place = f"memory {run_id}"
    self.opened.append((run_id, name))

  def log(self, step: int, values: Any) -> None:
    self._fail("log")
    self.sent.extend((step, name, value) for name, value in values.items())

  def close(self, failed: bool) -> None:
    self._fail("close")
    self.closed.append(failed)

  def _fail(self, where: str) -> None:
    if self.failing == where:
      raise ConnectionError(f"no route\nto host in {where}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[_Fake]:
  monkeypatch.setattr(_Fake, "opened", [], raising=False)
  monkeypatch.setattr(_Fake, "sent", [], raising=False)
  monkeypatch.setattr(_Fake, "closed", [], raising=False)
  monkeypatch.setitem(services.SERVICES, "wandb", _Fake)
  module = SimpleNamespace(Image=lambda picture: picture.size)
  monkeypatch.setitem(sys.modules, "wandb", module)
  return _Fake


def test_a_resumed_run_continues_its_tracked_run(tmp_path, fake, capsys):
  _train(tmp_path, _config("wandb"))
  (first, name), (second, _) = fake.opened
  assert first == second
  assert name == "tiny"
  assert fake.sent == [*_EXPECTED, (10, "samples", (4, 3))]
  assert fake.closed == [True, False]
  assert f"wandb tracks the run: memory {first}\n" in capsys.readouterr().out
  stored = json.loads((tmp_path / "trackers.json").read_text())
  assert stored == {
    "wandb": {"id": first, "step": 10, "sent": ["samples", "train/loss"]}
  }


def test_a_store_is_written_rarely(fake, gcs, monkeypatch):
  folder = as_path(f"{gcs.make_bucket()}/run")
  writes = []
  monkeypatch.setattr(
    services, "write_json", lambda path, value: writes.append(value["wandb"])
  )
  with MetricsWriter(folder, 0, _config("wandb")) as writer:
    for step in (2, 4, 6):
      writer.write(step, {"train/loss": 1.0})
      writer.flush()
  # At the start and at the end.
  assert [x["step"] for x in writes] == [-1, 6]
  assert len(fake.sent) == 3


def test_an_evaluation_after_the_restart_belongs_to_its_step(tmp_path, fake):
  config = _config("wandb", name="")
  with MetricsWriter(tmp_path, 0, config) as writer:
    writer.write(4, {"train/loss": 1.0})
  for _ in range(2):
    with MetricsWriter(tmp_path, 4, config) as writer:
      writer.write(4, {"test/vqa/accuracy": 0.5})
  assert fake.sent == [(4, "train/loss", 1.0), (4, "test/vqa/accuracy", 0.5)]
  assert fake.opened[0][1] == tmp_path.name


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_service_that_fails_is_one_warning(
  tmp_path, fake, where, monkeypatch, caplog
):
  monkeypatch.setattr(fake, "failing", where)
  ended_by = None
  try:
    with MetricsWriter(tmp_path, 0, _config("wandb", "tensorboard")) as writer:
      for step in (2, 4, 6):
        writer.write(step, {"train/loss": 1.0})
  except ConnectionError as error:
    ended_by = error
  assert ended_by is None
  assert [record.getMessage() for record in caplog.records] == [
    f"wandb failed (ConnectionError: no route to host in {where}); the run"
    " continues without it"
  ]
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("content", [b"[]", b"\xff", b'{"wandb": {"id": 3}}'])
def test_a_damaged_file_of_ids_does_not_end_the_run(tmp_path, fake, content):
  (tmp_path / "trackers.json").write_bytes(content)
  with MetricsWriter(tmp_path, 0, _config("wandb")) as writer:
    writer.write(2, {"train/loss": 1.0})
  assert (tmp_path / "metrics.jsonl").exists()


def test_trackers_are_checked(monkeypatch):
  trackers.check_trackers(_config("jsonl", "tensorboard"))
  monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"needs the package trackio; install it"):
    trackers.check_trackers(_config("trackio"))
  monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
  with pytest.raises(UserError, match=r"such as --config.tracking.project="):
    trackers.check_trackers(_config("trackio", project=""))


@pytest.fixture
def wandb() -> Iterator[Any]:
  """Returns the package, which reads the environment anew."""
  module = pytest.importorskip("wandb", reason="the package wandb is absent")
  module.teardown()
  yield module
  module.teardown()


def _records(data: bytes) -> Iterator[bytes]:
  """Yields the records of a file of wandb: a log as of LevelDB."""
  position, parts = 7, b""
  while position < len(data):
    block_left = 32768 - position % 32768
    if block_left < 7:
      position += block_left
      continue
    size, kind = struct.unpack_from("<HB", data, position + 4)
    parts += data[position + 7 : position + 7 + size]
    position += 7 + size
    # 1: a whole record, 2 to 4: its first, middle and last part.
    if kind in (1, 4):
      yield parts
      parts = b""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline(tmp_path, monkeypatch, wandb):
  from wandb.proto import wandb_internal_pb2

  messages: Any = wandb_internal_pb2
  monkeypatch.setenv("WANDB_MODE", "offline")
  _train(tmp_path, _config("wandb"))
  # Its own process writes the files.
  wandb.teardown()
  files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
  # Both processes write into one run.
  assert len(files) == 2
  assert len({path.name for path in files}) == 1
  rows, configs = [], set()
  for path in files:
    for data in _records(path.read_bytes()):
      record = messages.Record.FromString(data)
      configs |= {x.key for x in record.run.config.update}
      items = {
        x.key or "/".join(x.nested_key): json.loads(x.value_json)
        for x in record.history.item
      }
      rows += [
        (items["step"], name, value)
        for name, value in items.items()
        if name != "step" and not name.startswith("_")
      ]
  samples = [row for row in rows if row[1].startswith("samples")]
  assert {row[0] for row in samples} == {10}, rows
  assert sorted(row for row in rows if row not in samples) == _EXPECTED
  assert {"model", "train"} <= configs


def test_wandb_without_a_key(tmp_path, monkeypatch, caplog, wandb):
  monkeypatch.setenv("WANDB_MODE", "online")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.delenv("WANDB_API_KEY", raising=False)
  with MetricsWriter(tmp_path, 0, _config("wandb")) as writer:
    writer.write(2, {"train/loss": 1.0})
  (message,) = [x.getMessage() for x in caplog.records if x.name == "absl"]
  assert message.startswith("wandb failed (UsageError: No API key configured.")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trackio(tmp_path, monkeypatch):
  # Read when it is imported.
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  pytest.importorskip("trackio", reason="the package trackio is absent")
  _train(tmp_path, _config("trackio"))
  (path,) = (tmp_path / "trackio").glob("*.db")
  with sqlite3.connect(path) as database:
    lines = database.execute("select run_name, step, metrics from metrics")
    rows = lines.fetchall()
    (config,) = database.execute("select config from configs").fetchone()
  assert len({name for name, _, _ in rows}) == 1
  found = [
    (step, name, value)
    for _, step, text in rows
    for name, value in json.loads(text).items()
    if name != "samples"
  ]
  assert sorted(found) == _EXPECTED
  assert "model" in json.loads(config)
