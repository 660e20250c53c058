"""Checkpoints of one mesh are restored onto another."""

import json
import pathlib
from typing import Any

import jax
import pytest

from narvl_jax.parallel import fitting_sharding
from tests.support import meshes
from tests.support.processes import start_together


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder of checkpoints, one for each mesh."""
  folder = tmp_path_factory.mktemp("saved")
  for name, shape in meshes.SHAPES.items():
    meshes.save(meshes.make_setup(shape), folder / name)
  return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
  """Notes the shapes of all arrays that are created, and of their shards."""
  found = []
  make = jax.make_array_from_single_device_arrays

  def record(shape: Any, sharding: Any, arrays: Any, **options: Any) -> Any:
    found.append((tuple(shape), {x.shape for x in arrays}))
    return make(shape, sharding, arrays, **options)

  monkeypatch.setattr(jax, "make_array_from_single_device_arrays", record)
  return found


@pytest.mark.parametrize("after", meshes.SHAPES)
@pytest.mark.parametrize("before", meshes.SHAPES)
def test_every_mesh_restores_what_any_other_saved(
  saved: pathlib.Path, before: str, after: str, made: list[Any]
) -> None:
  setup = meshes.make_setup(meshes.SHAPES[after])
  state = meshes.restore(setup, saved / before)
  # No array was on more devices than its sharding has.
  read = sorted(str((shape, parts)) for shape, parts in made)
  wanted = jax.tree.map(
    lambda leaf, where: str((leaf.shape, {where.shard_shape(leaf.shape)})),
    setup.abstract_state,
    setup.shardings,
  )
  assert read == sorted(jax.tree.leaves(wanted))
  assert meshes.wrong_leaves(setup, state) == []


def test_leaves_of_another_size_are_read_in_parts(
  saved: pathlib.Path, made: list[Any]
) -> None:
  note, wrong = meshes.start_with_more_queries(saved / "2x4")
  assert "the first 6 of its 6 queries are copied, 2 more start fresh" in note
  assert wrong == []
  width = meshes.make_setup(meshes.TOGETHER).experiment.config.model.width
  parts = [parts for shape, parts in made if shape == (6, width)]
  # Parameters and averages; fsdp splits the width.
  assert {(6, width // 8)} in parts
  assert {(6, width)} not in parts


def test_shardings_of_other_shapes() -> None:
  mesh = meshes.make_setup(meshes.SHAPES["2x4"]).mesh
  spec = jax.sharding.PartitionSpec

  def fitted(shape: tuple[int, ...], *axes: Any) -> Any:
    where = jax.sharding.NamedSharding(mesh, spec(*axes))
    return fitting_sharding(where, shape).spec

  assert fitted((4, 8), None, "fsdp") == spec(None, "fsdp")
  assert fitted((4, 6), None, "fsdp") == spec(None, None)
  assert fitted((8,), ("data", "fsdp")) == spec(("data", "fsdp"))
  assert fitted((6,), ("data", "fsdp")) == spec("data")
  assert fitted((12,), ("data", "fsdp")) == spec("data")
  assert fitted((3, 8), None, "fsdp") == spec(None, "fsdp")


@pytest.mark.slow
def test_two_processes_restore_and_save(
  saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  hosts = start_together(
    tmp_path, ["-m", "tests.support.meshes", f"--folder={saved}"]
  )
  assert [host.wait() for host in hosts] == [0, 0], hosts[0].errors
  for i in range(2):
    wrong = json.loads((saved / f"wrong{i}.json").read_text())
    assert wrong == {name: [] for name in (*meshes.SHAPES, "together", "start")}
  assert "the first 6 of its 6 queries are copied" in hosts[0].output
  for shape in meshes.SHAPES.values():
    setup = meshes.make_setup(shape)
    state = meshes.restore(setup, saved / "together")
    assert meshes.wrong_leaves(setup, state) == []
