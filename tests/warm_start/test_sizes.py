"""Runs that start from weights of other sizes, names and vocabularies."""

import pathlib

import flax.traverse_util
import jax
import numpy as np
import pytest

from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.models import positions
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.warm_start.init_from import plan_weights
from tests.evaluation.tiny_run import copy_run
from tests.programs.other_run import (
  check_others,
  make_setup,
  started,
  stored_in,
)


@pytest.fixture
def start(tmp_path: pathlib.Path) -> pathlib.Path:
  """The folder of a run without moving averages."""
  return copy_run(tmp_path / "start")


# (data, fsdp, tensor); the last one splits arrays over all devices.
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
    f'init_from="{start}": the first {both} of its 8 queries are copied{more}'
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
    name.replace("layers/ffn", "blocks/mlp").replace("query_embed", "q"): value
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
    plan_weights(setup)
  config = setup.experiment.config
  config.init_renames = (
    (r"(.*)/blocks/mlp/(.*)", r"\1/layers/ffn/\2"),
    ("decoder/q", "decoder/query_embed"),
  )
  config.init_drops = ("encoder/layer_norm/bias", "embed_tokens")
  with pytest.raises(
    UserError,
    match=r"another model: head/kernel is there only; .*"
    r"""init_drops='\("head/kernel",\)'$""",
  ):
    plan_weights(setup)
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
    plan_weights(setup)


def test_fresh_and_frozen_is_reported(start: pathlib.Path) -> None:
  setup = make_setup(
    start,
    init_drops=("encoder/layer_norm/.*",),
    optimizer__rules=(("encoder/.*", {"freeze": True}), (".*", {})),
  )
  assert plan_weights(setup).notes[-1] == (
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
  # Converted weights do not record the size of their pictures.
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
  # The first and the last row keep their distance.
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
    f"; to use all of its words, --config.vocabulary.source=run"
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
    plan_weights(setup)
  setup.experiment.config.init_drops = ("embed_tokens",)
  assert len(plan_weights(setup).notes) == 1
