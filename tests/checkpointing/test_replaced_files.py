"""If anything replaces a file of a checkpoint, the previous one is used."""

import pathlib
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from narvl_jax.checkpointing import digests, integrity, overview, record
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError
from narvl_jax.run.start import restore_or_init
from tests.support import replacements
from tests.support.saved import files_of, make_state, make_target, save_run

DIGESTS = "digests.0-of-1.txt"
RECORD = "record/record.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """A run with two checkpoints that tests copy before they damage it."""
  folder = tmp_path_factory.mktemp("saved")
  save_run(folder)
  return folder


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
  """A copy of the run."""
  shutil.copytree(saved, tmp_path / "run")
  return tmp_path / "run"


def _array_file(folder: pathlib.Path) -> str:
  """Returns the largest file with values of arrays.

  How many there are depends on what TensorStore writes at a time.
  """
  names = [name for name in files_of(folder) if "/d/" in name]
  return max(names, key=lambda x: (folder / x).stat().st_size)


@pytest.mark.parametrize("kind", replacements.ALL)
@pytest.mark.parametrize("name", [RECORD, DIGESTS])
def test_it_is_named_by_every_look(run, name, kind, capsys):
  folder = run / "checkpoints" / "6"
  replacements.replace(folder / name, kind)
  damage = integrity.examine(folder)
  assert damage is not None
  assert name in str(damage)
  assert len(str(damage)) < 200
  with pytest.raises(UserError, match=r"1 of 2 read .* damaged: check"):
    overview.verify(run)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("3: intact")
  assert lines[1] == "6: DAMAGED"
  listed = overview.list_checkpoints(run).splitlines()
  assert [x.split()[0] for x in listed[-2:]] == ["3", "6"]
  assert "damaged" in listed[-1]
  assert "damaged" not in listed[-2]


@pytest.mark.parametrize("name", [RECORD, DIGESTS, "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("kind", ["deep JSON", "folder", "pipe", "wrong types"])
def test_a_run_resumes_from_the_one_before(run, name, kind):
  replacements.replace(run / "checkpoints" / "6" / name, kind)
  state = make_state(6)
  target = make_target(state)
  setup: Any = SimpleNamespace(
    abstract_state=jax.eval_shape(lambda: state),
    shardings=jax.tree.map(lambda x: x.sharding, target),
  )
  said: Any = []
  with Checkpoints(run, keep_last=2) as checkpoints:
    _, step, _ = restore_or_init(setup, checkpoints, said.append)
    assert step == 3
    assert (run / "damaged" / "6").is_dir()
    checkpoints.save(6, state)
  assert integrity.examine(run / "checkpoints" / "6") is None


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "endless link", "huge", "socket"])
def test_arrays_are_read_from_regular_files_only(run, kind, digests):
  folder = run / "checkpoints" / "6"
  name = _array_file(folder)
  replacements.replace(folder / name, kind)
  if not digests:
    (folder / DIGESTS).unlink()
  damage = integrity.examine(folder)
  assert damage is not None
  if digests or kind != "huge":
    assert name in str(damage)


def test_a_huge_file_that_was_added_is_not_read(run):
  folder = run / "checkpoints" / "6"
  replacements.NO_TEXTS["huge"](folder / "params" / "added")
  assert str(integrity.examine(folder)) == (
    "file params/added is not a file of this checkpoint"
  )


@pytest.mark.parametrize(
  "values",
  [
    {"step": "6"},
    {"score": "high"},
    {"run": []},
    {"config": 1},
    {"leaves": {"params/x": ["a", "b", "c"]}},
    {"leaves": []},
    {"leaves": {"params/x": 1}},
    {"vocabulary": 1},
  ],
)
def test_records_with_values_of_wrong_types_are_broken(run, values):
  folder = run / "checkpoints" / "6"
  digests.replace_record(folder, record.read_record(folder)._replace(**values))
  with pytest.raises(record.BrokenRecord, match="was changed"):
    record.read_record(folder)
  assert integrity.examine(folder) is not None


@pytest.mark.parametrize(
  "values",
  [
    {},
    {"step": 6, "files": {}},
    {"step": "6", "files": []},
    {"step": "6", "files": {"a": 1}},
    {"step": "6", "files": {"a": ["1", "x"]}},
  ],
)
def test_digests_of_wrong_types_are_damage(run, values):
  folder = run / "checkpoints" / "6"
  digests._write(folder / DIGESTS, values)
  assert f"{DIGESTS} was changed" in str(integrity.examine(folder))
