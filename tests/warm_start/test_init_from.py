"""Runs that start from the weights of another run."""

import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from narvl_jax.checkpointing.runs import load_run
from narvl_jax.checkpointing.writing import Checkpoints, restore_target
from narvl_jax.errors import UserError
from narvl_jax.run import training_run
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.state.parameters import flatten
from narvl_jax.warm_start.init_from import init_from, plan_weights
from tests.evaluation.tiny_run import STEP, copy_run, tiny_config
from tests.programs.other_run import fresh_state, make_setup, stored_in
from tests.support.twin import twin_of


@pytest.fixture
def start(tmp_path: pathlib.Path) -> pathlib.Path:
  """The folder of a run without moving averages."""
  return copy_run(tmp_path / "start")


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_weights_are_copied_and_the_rest_is_fresh(
  start: pathlib.Path, decay: float
) -> None:
  setup = make_setup(start, optimizer__ema_decay=decay)
  plan_weights(setup)
  with jax.set_mesh(setup.mesh):
    fresh = setup.init(jax.random.key(0))
    state = init_from(setup, fresh, plan_weights(setup))
  expected = {
    name.removeprefix("params/"): value
    for name, value in stored_in(start).items()
    if name.startswith("params/")
  }
  got = flatten(jax.device_get(state.params))
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  assert int(state.step) == 0
  for a, b in zip(
    jax.tree.leaves(state.opt_state),
    jax.tree.leaves(fresh.opt_state),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  if decay:
    assert state.ema is not None
    averages = flatten(jax.device_get(state.ema["params"]))
    for name, value in averages.items():
      np.testing.assert_array_equal(value, expected[name])
  else:
    assert state.ema is None
  for x, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(setup.shardings), strict=True
  ):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_moving_averages_are_used(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  setup = make_setup(start, optimizer__ema_decay=0.9)
  with jax.set_mesh(setup.mesh):
    state = init_from(setup, setup.init(jax.random.key(0)), plan_weights(setup))
  averages: Any = jax.tree.map(lambda x: x + 1, state.ema)
  second = tmp_path / "second"
  with Checkpoints(second, keep_last=1) as checkpoints:
    checkpoints.save(5, state.replace(ema=averages))  # pyright: ignore
  setup.experiment.config.init_from = str(second)
  with jax.set_mesh(setup.mesh):
    again = init_from(setup, setup.init(jax.random.key(0)), plan_weights(setup))
  for a, b in zip(
    jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True
  ):
    np.testing.assert_allclose(a, b + 1)


def test_half_precision_becomes_float32(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  _, variables, _ = load_run(start)
  half = jax.tree.map(lambda x: x.astype(np.float16), variables)
  with Checkpoints(tmp_path / "half", keep_last=1) as checkpoints:
    checkpoints.save_variables(0, half)
  setup = make_setup(start)
  setup.experiment.config.init_from = str(tmp_path / "half")
  plan_weights(setup)
  with jax.set_mesh(setup.mesh):
    state = init_from(setup, setup.init(jax.random.key(0)), plan_weights(setup))
  table = np.asarray(state.params["embed_tokens"])
  expected = np.asarray(half["params"]["embed_tokens"]).astype(np.float32)
  np.testing.assert_array_equal(table, expected, strict=True)


def test_another_model_is_rejected_by_its_leaves(start: pathlib.Path) -> None:
  setup = make_setup(start, model__encoder_layers=3)
  with pytest.raises(
    UserError,
    match=r"is of another model: encoder/\S+ has 1x\S+ there and 3x\S+ here, .*"
    r" and \d+ more; set config.model as in .*init_renames=.*or leave them"
    r" fresh by --config.init_drops='\(\"encoder/.*\)' and so on",
  ):
    plan_weights(setup)


def test_folders_without_weights(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  setup = make_setup(start)
  setup.experiment.config.init_from = str(tmp_path / "none")
  with pytest.raises(UserError, match='none": there is no such folder'):
    plan_weights(setup)
  (tmp_path / "none").mkdir()
  with pytest.raises(UserError, match='none" has no checkpoints; it must'):
    plan_weights(setup)
  official = tmp_path / "x.pt"
  official.write_bytes(b"")
  setup.experiment.config.init_from = str(official)
  with pytest.raises(
    UserError, match=r"is a file; convert it first: .*convert --from=\S+x.pt"
  ):
    plan_weights(setup)
  setup.experiment.config.init_from = str(tmp_path / "none")
  (tmp_path / "none" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UserError, match='none" has no checkpoint yet'):
    plan_weights(setup)


def test_damaged_weights_are_rejected(start: pathlib.Path) -> None:
  setup = make_setup(start)
  files = (start / "checkpoints" / str(STEP)).rglob("d/*")
  file = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  with (
    jax.set_mesh(setup.mesh),
    pytest.raises(
      UserError,
      match=rf"init_from=.*step {STEP} is damaged: .*; move"
      rf" {start}/checkpoints/{STEP} away .*\(--config.init_from\)",
    ),
  ):
    init_from(setup, fresh_state(setup), plan_weights(setup))


def test_nothing_is_written_before_the_check(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  config: Any = tiny_config().copy_and_resolve_references()
  config.init_from = str(tmp_path / "none")
  config.train.batch_size = 8
  with pytest.raises(UserError, match="there is no such folder"):
    training_run.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_weights_alone_cannot_be_resumed(start: pathlib.Path) -> None:
  _, variables, _ = load_run(start)
  setup = make_setup(start)
  target = restore_target(setup.abstract_state, setup.shardings)
  with Checkpoints(start.parent / "alone", keep_last=1) as checkpoints:
    checkpoints.save_variables(0, variables)
    checkpoints.wait()
    with pytest.raises(UserError, match=r"no state of an optimizer.*init_from"):
      checkpoints.restore(0, target)


# Tables with as many rows as that of the student, and with fewer.
@pytest.mark.parametrize("multiple", [128, 1])
def test_a_student_starts_from_its_teacher(
  tmp_path: pathlib.Path, start: pathlib.Path, multiple: int
) -> None:
  folder = tmp_path / "ar"
  theirs = twin_of(start, folder, model__vocab_multiple=multiple)
  setup = make_setup(start, optimizer__ema_decay=0.9)
  setup.experiment.config.init_from = str(folder)
  words = setup.experiment.vocabulary.size - 1
  assert plan_weights(setup).notes == [
    f'init_from="{folder}": {note}'
    for note in (
      "it is an autoregressive model: decoder/query_embed stays fresh",
      f"the rows of embed_tokens from {words} on, blank and padding, stay"
      " fresh",
    )
  ]
  with jax.set_mesh(setup.mesh):
    fresh = setup.init(jax.random.key(0))
    before = flatten(jax.device_get(fresh.params))
    state = init_from(setup, fresh, plan_weights(setup))
  got = flatten(jax.device_get(state.params))
  assert set(got) == {*theirs, "decoder/query_embed"} == set(before)
  for name, value in got.items():
    if name == "embed_tokens":
      np.testing.assert_array_equal(value[:words], theirs[name][:words])
      np.testing.assert_array_equal(value[words:], before[name][words:])
    else:
      expected = theirs.get(name, before[name])
      np.testing.assert_array_equal(value, expected, err_msg=name)
  assert state.ema is not None
  averages = flatten(jax.device_get(state.ema["params"]))
  for name, value in averages.items():
    np.testing.assert_array_equal(value, got[name])
  for x, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(setup.shardings), strict=True
  ):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_an_autoregressive_model_starts_from_a_parallel_one(
  start: pathlib.Path,
) -> None:
  setup = make_setup(start, model__decoder="autoregressive")
  words = setup.experiment.vocabulary.size - 1
  assert plan_weights(setup).notes == [
    f'init_from="{start}": {note}'
    for note in (
      "it is a parallel model, whose queries are left out",
      f"the rows of embed_tokens from {words} on stay fresh",
    )
  ]
  with jax.set_mesh(setup.mesh):
    state = init_from(setup, setup.init(jax.random.key(0)), plan_weights(setup))
  got, theirs = flatten(jax.device_get(state.params)), stored_in(start)
  assert {f"params/{name}" for name in got} == {
    *theirs.keys() - {"params/decoder/query_embed"}
  }
  table = got.pop("embed_tokens")
  np.testing.assert_array_equal(
    table[:words], theirs["params/embed_tokens"][:words]
  )
  assert not np.allclose(table[words], theirs["params/embed_tokens"][words])
  for name, value in got.items():
    np.testing.assert_array_equal(value, theirs[f"params/{name}"])


def test_a_twin_must_fit_in_all_else(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  folder = tmp_path / "wide"
  twin_of(start, folder, model__width=64)
  setup = make_setup(start)
  setup.experiment.config.init_from = str(folder)
  with pytest.raises(UserError, match=r"another model: .* and \d+ more; set"):
    plan_weights(setup)
  # More rows than ours, without a vocabulary.
  folder = tmp_path / "long"
  twin_of(start, folder, model__vocab_multiple=512)
  shutil.rmtree(folder / "vocabulary")
  config = workdir_lib.read_config(folder)
  config.model.vocab_multiple = 128
  workdir_lib.write_config(folder, config)
  setup.experiment.config.init_from = str(folder)
  with pytest.raises(UserError, match=r"embed_tokens has 512x32 there and"):
    plan_weights(setup)
