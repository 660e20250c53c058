"""Runs that start from the weights of others."""

import pathlib
import shutil
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import pytest

from narvl_jax import experiment as experiment_lib
from narvl_jax import train as train_lib
from narvl_jax.data.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.models import positions
from narvl_jax.parallel import mesh_from_config
from narvl_jax.training import workdir as workdir_lib
from narvl_jax.training.checkpoints import Checkpoints, restore_target
from narvl_jax.training.init_from import check_init_from, init_from
from narvl_jax.training.optimizer import flatten
from narvl_jax.training.setup import Setup, build_setup
from tests.evaluation.tiny_run import STEP, copy_run, tiny_config
from tests.training.twin import twin_of


@pytest.fixture
def start(tmp_path: pathlib.Path) -> pathlib.Path:
  """The folder of a run without moving averages."""
  return copy_run(tmp_path / "start")


def make_setup(start: Any, words: Any = None, **changes: Any) -> Setup:
  """Returns a run that starts from a folder.

  Args:
    start: the folder.
    words: folder with the vocabulary of the run; that of `start` by default.
    **changes: to the config, double underscores in the place of dots.
  """
  config: Any = tiny_config().copy_and_resolve_references()
  config.init_from = str(start)
  config.train.batch_size = 8
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in changes.items()}
  )
  experiment = experiment_lib.build(config, words or start)
  return build_setup(experiment, mesh_from_config(config.mesh))


def fresh_state(setup: Setup) -> Any:
  """Returns random numbers where the state shall lie."""
  rng = np.random.default_rng(3)

  def fill(leaf: Any, sharding: Any) -> jax.Array:
    values = rng.normal(size=leaf.shape).astype(leaf.dtype)
    return jax.device_put(values, sharding)

  return jax.tree.map(fill, setup.abstract_state, setup.shardings)


def started(setup: Setup) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
  """Returns the notes, and the variables before and after.

  Every leaf must lie where the run wants it.
  """
  notes = check_init_from(setup)
  state = fresh_state(setup)
  before = flatten(
    jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
  )
  with jax.set_mesh(setup.mesh):
    state = init_from(setup, state)
  for x, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(setup.shardings), strict=True
  ):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)
  after = {"params": state.params, "batch_stats": state.batch_stats}
  return notes, before, flatten(jax.device_get(after))


def check_others(
  got: dict[str, Any], expected: dict[str, Any], but: set[str]
) -> None:
  """Checks that all leaves but some are as expected."""
  assert but <= got.keys()
  for name in got.keys() - but:
    np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def stored_in(start: pathlib.Path) -> dict[str, np.ndarray]:
  _, variables, _ = experiment_lib.restore(start)
  return flatten(jax.device_get(variables))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_weights_are_taken_and_the_rest_is_fresh(
  start: pathlib.Path, decay: float
) -> None:
  setup = make_setup(start, optimizer__ema_decay=decay)
  check_init_from(setup)
  with jax.set_mesh(setup.mesh):
    fresh = setup.init(jax.random.key(0))
    state = init_from(setup, fresh)
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


def test_moving_averages_are_what_is_taken(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  setup = make_setup(start, optimizer__ema_decay=0.9)
  with jax.set_mesh(setup.mesh):
    state = init_from(setup, setup.init(jax.random.key(0)))
  averages: Any = jax.tree.map(lambda x: x + 1, state.ema)
  second = tmp_path / "second"
  with Checkpoints(second, keep_last=1) as checkpoints:
    checkpoints.save(5, state.replace(ema=averages))  # pyright: ignore
  setup.experiment.config.init_from = str(second)
  with jax.set_mesh(setup.mesh):
    again = init_from(setup, setup.init(jax.random.key(0)))
  for a, b in zip(
    jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True
  ):
    np.testing.assert_allclose(a, b + 1)


def test_half_precision_becomes_float32(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  _, variables, _ = experiment_lib.restore(start)
  half = jax.tree.map(lambda x: x.astype(np.float16), variables)
  with Checkpoints(tmp_path / "half", keep_last=1) as checkpoints:
    checkpoints.save_variables(0, half)
  setup = make_setup(start)
  setup.experiment.config.init_from = str(tmp_path / "half")
  check_init_from(setup)
  with jax.set_mesh(setup.mesh):
    state = init_from(setup, setup.init(jax.random.key(0)))
  table = np.asarray(state.params["embed_tokens"])
  expected = np.asarray(half["params"]["embed_tokens"]).astype(np.float32)
  np.testing.assert_array_equal(table, expected, strict=True)


def test_another_model_is_told_by_its_leaves(start: pathlib.Path) -> None:
  setup = make_setup(start, model__encoder_layers=3)
  with pytest.raises(
    UserError,
    match=r"is of another model: encoder/\S+ has 1x\S+ there and 3x\S+ here, .*"
    r" and \d+ more; set config.model as in .*init_renames=.*or leave it fresh"
    r" by --config.init_drops='\(\"encoder/.*\)' and so on",
  ):
    check_init_from(setup)


# (data, fsdp, tensor): with the last one leaves are split over all devices.
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 4, 2)])
@pytest.mark.parametrize("queries", [5, 12])
def test_another_number_of_queries(
  start: pathlib.Path, queries: int, mesh: tuple[int, int, int]
) -> None:
  data, fsdp, tensor = mesh
  notes, before, after = started(
    make_setup(
      start,
      model__num_queries=queries,
      mesh__data=data,
      mesh__fsdp=fsdp,
      mesh__tensor=tensor,
    )
  )
  more = "" if queries < 8 else ", 4 more start fresh"
  both = min(queries, 8)
  assert notes == [
    f'init_from="{start}": the first {both} of its 8 queries are taken{more}'
  ]
  name = "params/decoder/query_embed"
  stored = stored_in(start)
  np.testing.assert_array_equal(after[name][:both], stored[name][:both])
  np.testing.assert_array_equal(after[name][both:], before[name][both:])
  check_others(after, stored, {name})


def test_renamed_dropped_and_new_parameters(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  stored = stored_in(start)
  there = {
    name.replace("layers/ffn", "blocks/mlp"): value
    for name, value in stored.items()
    if name != "params/encoder/layer_norm/bias"
  }
  there["params/head/kernel"] = np.ones((24, 3), np.float32)
  folder = tmp_path / "other"
  with Checkpoints(folder, keep_last=1) as checkpoints:
    tree = jax.tree.map(
      jax.numpy.asarray, flax.traverse_util.unflatten_dict(there, sep="/")
    )
    checkpoints.save_variables(0, {"batch_stats": {}, **tree})
  setup = make_setup(start, init_from=str(folder))
  with pytest.raises(
    UserError,
    match=r"decoder/blocks/mlp/fc1_bias is there only"
    r' \(nearest here: "decoder/layers/ffn/fc1_bias"\), ',
  ):
    check_init_from(setup)
  config = setup.experiment.config
  config.init_renames = ((r"(.*)/blocks/mlp/(.*)", r"\1/layers/ffn/\2"),)
  config.init_drops = ("encoder/layer_norm/bias", "embed_tokens")
  with pytest.raises(
    UserError,
    match=r"another model: head/kernel is there only; .*"
    r"""init_drops='\("head/kernel",\)'$""",
  ):
    check_init_from(setup)
  config.init_drops += ("head/.*",)
  notes, before, after = started(setup)
  assert notes == [
    f'init_from="{folder}": embed_tokens, encoder/layer_norm/bias stay fresh'
    " (init_drops)"
  ]
  fresh = {"params/embed_tokens", "params/encoder/layer_norm/bias"}
  check_others(after, stored, fresh)
  check_others(after, before, after.keys() - fresh)
  config.init_drops += ("tail/.*",)
  with pytest.raises(UserError, match=r'init_drops: "tail/.*" is never used'):
    check_init_from(setup)


def test_fresh_and_frozen_is_told(start: pathlib.Path) -> None:
  setup = make_setup(
    start,
    init_drops=("encoder/layer_norm/.*",),
    optimizer__rules=(("encoder/.*", {"freeze": True}), (".*", {})),
  )
  assert check_init_from(setup)[-1] == (
    f'init_from="{start}": encoder/layer_norm/bias, encoder/layer_norm/scale'
    " start fresh but are frozen, so they stay random"
    " (--config.optimizer.rules)"
  )


def test_another_size_of_pictures(start: pathlib.Path) -> None:
  changes = {"data__image_size": (48, 32), "model__image_bucket_size": 6}
  names = ["image_rel_pos_table", "embed_image_positions"]
  full = {f"params/encoder/{name}" for name in names}
  stored = stored_in(start)
  grid = stored["params/encoder/embed_image_positions"][1:].reshape(16, 16, -1)
  # Weights that are no run of this program tell of no pictures.
  notes, _, after = started(make_setup(start, **changes))
  assert sorted(notes) == [
    f'init_from="{start}": {what} from a table for 16x16 to one for 6x6'
    for what in ("distances of image tokens", "image positions")
  ]
  table = after["params/encoder/embed_image_positions"]
  np.testing.assert_array_equal(table[1:].reshape(6, 6, -1), grid[:6, :6])
  check_others(after, stored, full)
  # Pictures of 32 x 32 had 4 x 4 tokens; now there are 6 x 4.
  (start / workdir_lib.ENVIRONMENT_FILE).write_text("{}")
  notes, _, after = started(make_setup(start, **changes))
  assert sorted(notes) == [
    f'init_from="{start}": {what} of the grid 4x4 stretched to 6x4, from a'
    " table for 16x16 to one for 6x6"
    for what in ("distances of image tokens", "image positions")
  ]
  table = after["params/encoder/embed_image_positions"]
  table = table[1:].reshape(6, 6, -1)
  np.testing.assert_allclose(table[0, :4], grid[0, :4], atol=1e-5)
  np.testing.assert_allclose(table[5, :4], grid[3, :4], atol=1e-5)
  np.testing.assert_array_equal(table[:, 4:], grid[:6, 4:6])
  distances = after["params/encoder/image_rel_pos_table"]
  theirs = stored["params/encoder/image_rel_pos_table"]
  ours = distances[0, positions.image_buckets(6, 4, 6)]
  theirs = theirs[0, positions.image_buckets(4, 4, 16)]
  # From the first to the last row it is as far as it was.
  np.testing.assert_allclose(ours[:4, -4:], theirs[:4, -4:], atol=1e-5)
  assert not np.allclose(ours[4:8, :4], theirs[4:8, :4])
  check_others(after, stored, full)


def test_another_vocabulary(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  texts = [" a RED dog", " the GREEN circle", " what is left of"] * 3
  words = Vocabulary.train(texts, 90, num_bins=31)
  words.save(tmp_path / "vocabulary")
  setup = make_setup(
    start,
    vocabulary__source="run",
    vocabulary__path=str(tmp_path),
    words=tmp_path,
    mesh__data=1,
    mesh__fsdp=4,
    mesh__tensor=2,
  )
  notes, before, after = started(setup)
  theirs = Vocabulary.load(start / "vocabulary")
  name = "params/embed_tokens"
  stored = stored_in(start)
  check_others(after, stored, {name})
  known = {theirs.symbol(i): i for i in range(theirs.size)}
  found = 0
  for i in range(len(after[name])):
    expected = before[name][i]
    if words.bin_start <= i < words.blank_id:
      place = (i - words.bin_start) / 30
      expected = stored[name][theirs.bin_start + round(15 * place)]
    elif i < words.size and words.symbol(i) in known:
      expected = stored[name][known[words.symbol(i)]]
      found += 1
    np.testing.assert_array_equal(after[name][i], expected)
  assert 5 < found < words.bin_start
  assert len(notes) == 1
  assert notes[0].startswith(
    f'init_from="{start}": it has another vocabulary: {found + 31} of'
    f" {words.size} tokens were found there by name,"
  )
  assert notes[0].endswith(
    f"; to take all of its words, --config.vocabulary.source=run"
    f" --config.vocabulary.path={start}"
  )


def test_weights_that_the_vocabulary_beside_them_does_not_fit(
  start: pathlib.Path,
) -> None:
  setup = make_setup(start)
  texts = [" a red dog"] * 3
  Vocabulary.train(texts, 600, num_bins=500).save(start / "vocabulary")
  with pytest.raises(
    UserError,
    match=r"vocabulary there has 5\d+ ids, but embed_tokens 128 rows, .*"
    r"""init_drops='\("embed_tokens",\)'""",
  ):
    check_init_from(setup)
  setup.experiment.config.init_drops = ("embed_tokens",)
  assert len(check_init_from(setup)) == 1


def test_folders_without_weights(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  setup = make_setup(start)
  setup.experiment.config.init_from = str(tmp_path / "none")
  with pytest.raises(UserError, match='none": there is no such folder'):
    check_init_from(setup)
  (tmp_path / "none").mkdir()
  with pytest.raises(UserError, match='none" holds no checkpoints; it must'):
    check_init_from(setup)
  official = tmp_path / "x.pt"
  official.write_bytes(b"")
  setup.experiment.config.init_from = str(official)
  with pytest.raises(
    UserError, match=r"is a file; convert it first: .*convert --from=\S+x.pt"
  ):
    check_init_from(setup)
  setup.experiment.config.init_from = str(tmp_path / "none")
  (tmp_path / "none" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UserError, match='none" has no checkpoint yet'):
    check_init_from(setup)


def test_damaged_weights_are_not_taken(start: pathlib.Path) -> None:
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
    init_from(setup, fresh_state(setup))


def test_nothing_is_written_before_the_check(
  tmp_path: pathlib.Path, start: pathlib.Path
) -> None:
  config: Any = tiny_config().copy_and_resolve_references()
  config.init_from = str(tmp_path / "none")
  config.train.batch_size = 8
  with pytest.raises(UserError, match="there is no such folder"):
    train_lib.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_weights_alone_cannot_be_resumed(start: pathlib.Path) -> None:
  _, variables, _ = experiment_lib.restore(start)
  setup = make_setup(start)
  target = restore_target(setup.abstract_state, setup.shardings)
  with Checkpoints(start.parent / "alone", keep_last=1) as checkpoints:
    checkpoints.save_variables(0, variables)
    checkpoints.wait()
    with pytest.raises(UserError, match=r"no state of an optimizer.*init_from"):
      checkpoints.restore(0, target)


# Tables of as many and fewer rows than that of the student.
@pytest.mark.parametrize("multiple", [128, 1])
def test_a_student_starts_from_its_teacher(
  tmp_path: pathlib.Path, start: pathlib.Path, multiple: int
) -> None:
  folder = tmp_path / "ar"
  theirs = twin_of(start, folder, model__vocab_multiple=multiple)
  setup = make_setup(start, optimizer__ema_decay=0.9)
  setup.experiment.config.init_from = str(folder)
  words = setup.experiment.vocabulary.size - 1
  assert check_init_from(setup) == [
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
    state = init_from(setup, fresh)
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
  assert check_init_from(setup) == [
    f'init_from="{start}": {note}'
    for note in (
      "it is a parallel model, whose queries are left out",
      f"the rows of embed_tokens from {words} on stay fresh",
    )
  ]
  with jax.set_mesh(setup.mesh):
    state = init_from(setup, setup.init(jax.random.key(0)))
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
    check_init_from(setup)
  # More words than ours; no vocabulary tells of them.
  folder = tmp_path / "long"
  twin_of(start, folder, model__vocab_multiple=512)
  shutil.rmtree(folder / "vocabulary")
  config = workdir_lib.read_config(folder)
  config.model.vocab_multiple = 128
  workdir_lib.write_config(folder, config)
  setup.experiment.config.init_from = str(folder)
  with pytest.raises(UserError, match=r"embed_tokens has 512x32 there and"):
    check_init_from(setup)
