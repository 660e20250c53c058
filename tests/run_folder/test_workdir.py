"""The run folder: which run it contains and what may be done with it."""

import errno
import json
import os
import pathlib
import subprocess

import pytest

from narvl_jax.errors import UserError
from narvl_jax.experiment.config import to_json
from narvl_jax.run_folder import workdir as workdir_lib
from tests.support import replacements
from tests.support.disks import read_only, small_disk
from tests.support.tiny import tiny_config


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
  workdir_lib.write_config(tmp_path / "run", tiny_config())
  return tmp_path / "run"


def test_new_folder_has_no_run(tmp_path):
  assert not workdir_lib.check(tmp_path / "a" / "b", tiny_config())
  assert not workdir_lib.check(tmp_path, tiny_config())
  assert not list(tmp_path.iterdir())


def test_same_config_resumes(run):
  assert workdir_lib.check(run, tiny_config())
  config = workdir_lib.read_config(run)
  assert to_json(config) == to_json(tiny_config())


def test_settings_that_came_later_do_not_differ(run):
  path = run / "config.json"
  values = json.loads(path.read_text())
  del values["optimizer"]["ema_warmup"]
  del values["tasks"]["grounding"]["flip"]
  path.write_text(json.dumps(values))
  assert workdir_lib.check(run, tiny_config())


def test_a_run_may_resume_with_other_workers(run):
  config = tiny_config()
  config.data.num_workers = 2
  config.data.num_threads = 0
  config.data.prefetch = 1
  config.data.max_bad_fraction = 0.5
  config.bad_numbers.policy = "skip"
  assert workdir_lib.check(run, config)
  config.data.temperature = 1.0
  with pytest.raises(UserError, match=r"config: data.temperature: 0.0 -> 1.0"):
    workdir_lib.check(run, config)


def test_a_run_may_resume_on_another_mesh(run):
  config = tiny_config()
  config.mesh.fsdp = 4
  assert workdir_lib.check(run, config)


def test_other_config_shows_the_difference(run):
  config = tiny_config()
  config.optimizer.learning_rate = 5e-4
  config.seed = 3
  with pytest.raises(
    UserError,
    match=r"--workdir=.*run contains a run with another config:"
    r" optimizer.learning_rate: 0.001 -> 0.0005; seed: 0 -> 3;"
    r" use another --workdir, or the config of this run to resume it$",
  ):
    workdir_lib.check(run, config)


def test_longer_run_is_another_run(run):
  config = tiny_config()
  config.train.steps = 7
  with pytest.raises(
    UserError, match=r"train.steps: 6 -> 7; .*cannot be extended"
  ):
    workdir_lib.check(run, config)


def test_long_differences_are_cut(run):
  config = tiny_config()
  for name in config.train:
    if name != "eval_split":
      config.train[name] += 1
  for name in ("seed", "vocabulary.size", "data.max_text_length"):
    config.update_from_flattened_dict({name: 1})
  with pytest.raises(UserError, match=r"; and 2 more; use another"):
    workdir_lib.check(run, config)


def test_difference_names_absent_facts():
  assert workdir_lib.diff(
    {"a": {"b": 1, "c": 2, "f": None}, "d": [1]},
    {"a": {"b": 1, "e": "x", "f": ""}, "d": [2, 3]},
  ) == {
    "a.c": ("2", "(absent)"),
    "a.e": ("(absent)", "x"),
    "a.f": ("(unset)", '""'),
    "d": ("(1,)", "(2, 3)"),
  }


def test_file_in_the_place_of_the_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"file is a file, not a folder"):
    workdir_lib.check(tmp_path / "file", tiny_config())
  with pytest.raises(UserError, match=r"b is below .*file, a file, not a fol"):
    workdir_lib.check(tmp_path / "file" / "a" / "b", tiny_config())


def test_folder_without_permission(tmp_path, monkeypatch):
  # Root, which may run this test, has every permission.
  monkeypatch.setattr(os, "access", lambda *_: False)
  with pytest.raises(
    UserError, match=r"run cannot be written: no permission for .*; use anoth"
  ):
    workdir_lib.check(tmp_path / "run", tiny_config())


def test_read_only_folder(tmp_path):
  with small_disk(tmp_path / "disk", 100) as disk:
    read_only(disk)
    with pytest.raises(
      UserError,
      match=r"run cannot be written: Read-only file system .*; make it writable"
      r" again; use another --workdir",
    ):
      workdir_lib.check(disk / "run", tiny_config())


def test_checkpoints_of_an_unknown_run(run):
  (run / "checkpoints" / "3").mkdir(parents=True)
  assert workdir_lib.check(run, tiny_config())
  (run / "config.json").unlink()
  with pytest.raises(
    UserError, match=r"contains checkpoints but no config.json, .*use another"
  ):
    workdir_lib.check(run, tiny_config())


@pytest.mark.parametrize("data", [b'{"seed": 0', b"", b"\xff\xfe\x00", b"[1]"])
def test_damaged_config(run, data):
  (run / "config.json").write_bytes(data)
  for read in (
    lambda: workdir_lib.check(run, tiny_config()),
    lambda: workdir_lib.read_config(run),
  ):
    with pytest.raises(
      UserError, match=r"config.json cannot be read \(.*\); use another --work"
    ):
      read()


@pytest.mark.parametrize(
  "kind",
  ["folder", "pipe", "socket", "endless link", "huge", "deep JSON", "number"],
)
def test_a_config_that_is_no_file_ends_in_one_line(run, kind):
  replacements.replace(run / "config.json", kind)
  with pytest.raises(
    UserError, match=r"config.json cannot be read \([^\n]*\);"
  ):
    workdir_lib.check(run, tiny_config())


def test_config_is_written_whole_or_not_at_all(run, monkeypatch):
  before = (run / "config.json").read_text()
  config = tiny_config()
  config.seed = 5

  def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(
    UserError,
    match=r'cannot write ".*config.json": No space left on device \([\d,]+'
    r" bytes are free\); make room$",
  ):
    workdir_lib.write_config(run, config)
  assert [path.name for path in run.iterdir()] == ["config.json"]
  assert (run / "config.json").read_text() == before


def test_environment_keeps_earlier_starts(run):
  for step in (0, 3, 5):
    workdir_lib.write_environment(run, step)
  written = json.loads((run / "environment.json").read_text())
  assert written["step"] == 5
  assert [start["step"] for start in written["previous"]] == [0, 3]
  assert "previous" not in written["previous"][1]
  assert written["devices"]["count"] == 8
  assert written["devices"]["backend"] == "cpu"
  assert set(written["versions"]) > {"python", "jax", "flax", "optax", "grain"}


def test_environment_without_git(monkeypatch):
  def fail(*_: object, **__: object) -> None:
    raise FileNotFoundError("git")

  monkeypatch.setattr(subprocess, "run", fail)
  assert workdir_lib.environment()["commit"] is None


def test_facts_distinguish_hosts():
  config = tiny_config()
  facts = workdir_lib.facts(config)
  assert facts["config optimizer.learning_rate"] == "0.001"
  assert facts["config data.image_size"] == "[48, 48]"
  assert {"version python", "version jax", "code commit"} <= {*facts}
  config.optimizer.learning_rate = 0.5
  changed = workdir_lib.facts(config)
  assert {k for k in facts if facts[k] != changed[k]} == {
    "config optimizer.learning_rate"
  }


def test_facts_distinguish_changed_code(monkeypatch):
  before = workdir_lib.facts(tiny_config())
  read = pathlib.Path.read_bytes
  monkeypatch.setattr(
    pathlib.Path,
    "read_bytes",
    lambda path: read(path) + (b"#" if path.name == "loss.py" else b""),
  )
  after = workdir_lib.facts(tiny_config())
  assert {k for k in before if before[k] != after[k]} == {"code files"}


def test_hosts_share_the_folder(run, tmp_path):
  workdir_lib.check_shared(run, "host 1 (b)", patience=0)
  with pytest.raises(
    UserError,
    match=r"/other on host 1 \(b\) is not the folder of host 0: there is no"
    r" config.json; use a --workdir that all hosts share",
  ):
    workdir_lib.check_shared(tmp_path / "other", "host 1 (b)", patience=0)
