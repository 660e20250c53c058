"""Saving, retention, restoring, and choosing a step."""

import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from ml_collections import ConfigDict

from narvl_jax.checkpointing.chosen import choose_step
from narvl_jax.checkpointing.record import read_leaf
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError
from narvl_jax.parallel import make_mesh, replicated
from tests.support.saved import (
  assert_equal,
  make_state,
  make_target,
  save_run,
)


def _save_all(
  folder: pathlib.Path, scores: dict[int, float | None], keep_last: int = 2
) -> list[int]:
  state = make_state(1)
  with Checkpoints(folder, keep_last=keep_last) as checkpoints:
    for step, score in scores.items():
      checkpoints.save(step, state, score=score)
      # The next step of a run would donate the state.
    checkpoints.wait()
    return checkpoints.steps()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
  """Warnings that Orbax logs."""
  messages: list[str] = []

  class Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      messages.append(record.getMessage())

  handler = Handler(logging.WARNING)
  logger = absl_logging.get_absl_logger()
  logger.addHandler(handler)
  yield messages
  logger.removeHandler(handler)


@pytest.mark.parametrize(
  ("scores", "kept", "best"),
  [
    # The last ones are always kept.
    ({1: None, 2: None, 3: None, 4: None}, [3, 4], None),
    # The best is kept after later ones without a score.
    ({1: 0.2, 2: 0.7, 3: None, 4: None, 5: None}, [2, 4, 5], 2),
    # A worse one is not kept.
    ({1: 0.2, 2: 0.1, 3: 0.9, 4: 0.3, 5: 0.4}, [3, 4, 5], 3),
    # A score of zero is better than none.
    ({1: 0.0, 2: None, 3: None, 4: None}, [1, 3, 4], 1),
    ({1: None, 2: None, 3: None, 4: -1.0}, [3, 4], 4),
    # The later of two equal scores.
    ({1: 0.5, 2: 0.5, 3: 0.1, 4: 0.1}, [2, 3, 4], 2),
  ],
)
def test_last_and_best_are_kept(tmp_path, warnings, scores, kept, best):
  assert _save_all(tmp_path, scores) == kept
  on_disk = sorted(int(x.name) for x in (tmp_path / "checkpoints").iterdir())
  assert on_disk == kept
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best_step == best
    assert checkpoints.last_step == kept[-1]
    assert choose_step(checkpoints, "best") == (best or kept[-1])
    assert choose_step(checkpoints, "last") == kept[-1]
  # Orbax warns only of checkpoints that are faster than this disk.
  assert [x for x in warnings if "previous save" not in x] == []


def test_best_of_an_earlier_process_is_kept(tmp_path):
  _save_all(tmp_path, {1: 0.9, 2: 0.1})
  assert _save_all(tmp_path, {3: 0.2, 4: None, 5: 0.3}) == [1, 4, 5]


def test_number_of_last_ones(tmp_path):
  scores = dict.fromkeys(range(1, 6))
  assert _save_all(tmp_path, scores, keep_last=3) == [3, 4, 5]


@pytest.mark.parametrize("ema", [True, False])
def test_state_comes_back_exactly(tmp_path, ema):
  state = make_state(7, ema=ema)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(7, state)
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(7, make_target(state))
  assert_equal(restored, state)
  assert restored.step.dtype == jnp.int32
  for leaf in jax.tree.leaves(restored):
    assert leaf.sharding == replicated(make_mesh())


def test_state_may_be_donated_as_soon_as_it_is_saved(tmp_path):
  where = replicated(make_mesh())
  state = jax.device_put(make_state(7), where)
  expected = jax.device_get(state)
  grow = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(7, state)
    grow(state)
    checkpoints.wait()
    restored = checkpoints.restore(7, make_target(make_state(7)))
  assert_equal(jax.device_get(restored), expected)


def test_variables_to_evaluate(tmp_path):
  state = make_state(7)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(7, state)
  target = make_target(state)
  variables = {"params": target.params, "batch_stats": target.batch_stats}
  with Checkpoints(tmp_path) as checkpoints:
    plain = checkpoints.restore_variables(7, variables, None)
    averaged = checkpoints.restore_variables(7, variables, target.ema)
  assert_equal(
    plain, {"params": state.params, "batch_stats": state.batch_stats}
  )
  assert state.ema is not None
  # Frozen parameters have no average and are used themselves.
  assert averaged["params"]["encoder"].keys() == {"kernel", "bias"}
  assert_equal(
    averaged["params"]["encoder"]["kernel"],
    state.ema["params"]["encoder"]["kernel"],
  )
  assert_equal(
    averaged["params"]["encoder"]["bias"], state.params["encoder"]["bias"]
  )
  assert_equal(averaged["batch_stats"], state.ema["batch_stats"])


def test_saving_compiles_one_program_once(tmp_path):
  compiled = []

  def listen(event: str, duration_secs: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(duration_secs)

  # An array of which every device could write a part.
  params = {"kernel": jnp.ones((8, 24))}
  state = dataclasses.replace(make_state(1, ema=False), params=params)
  state = jax.device_put(state, replicated(make_mesh()))
  jax.monitoring.register_event_duration_secs_listener(listen)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, state)
    # The program of the checksums.
    assert len(compiled) == 1
    checkpoints.save(2, state)
  assert len(compiled) == 1


def test_progress(tmp_path):
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    assert checkpoints.progress == "none"
    checkpoints.save(3, make_state(3))
    assert checkpoints.progress in ("saving 3", "saved 3")
    checkpoints.wait()
    assert checkpoints.progress == "saved 3"
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    assert checkpoints.progress == "saved 3"


def test_opening_to_read_creates_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.last_step is None
    assert checkpoints.best_step is None
    assert checkpoints.steps() == []
    with pytest.raises(UserError, match=r"no checkpoint yet; train it first"):
      choose_step(checkpoints, "best")
  assert not list(tmp_path.iterdir())


def test_choosing_a_step(tmp_path):
  _save_all(tmp_path, {3: 0.5, 6: 0.4})
  with Checkpoints(tmp_path) as checkpoints:
    assert choose_step(checkpoints, 3) == choose_step(checkpoints, "3") == 3
    assert choose_step(checkpoints, "best") == 3
    for wanted in ("bset", "4", 4, "-1"):
      with pytest.raises(
        UserError,
        match=rf'no checkpoint "{wanted}"; this run has 3, 6; valid are also',
      ):
        choose_step(checkpoints, wanted)


def test_closing_twice_is_harmless(tmp_path):
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(1, make_state(1))
    checkpoints.close()


def test_kept_checkpoints_follow_the_settings(tmp_path):
  scores = {1: 0.9, 2: 0.8, 3: 0.1, 4: 0.7, 5: None, 6: 0.2, 7: None}
  state = make_state(1)
  with Checkpoints(
    tmp_path, keep_last=1, keep_best=2, keep_every=3
  ) as checkpoints:
    for step, score in scores.items():
      checkpoints.save(step, state, score=score)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3, 6, 7]
    assert checkpoints.best_step == 1
  # Settings of a later process take effect when it saves.
  with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
    checkpoints.save(8, state)
    checkpoints.wait()
    assert checkpoints.steps() == [7, 8]


def test_values_stored_besides_the_state(tmp_path):
  config = ConfigDict({"seed": 5, "train": {"steps": 3}, "shape": (1, 2)})
  run = {"position": 12, "skipped": [3, 4]}
  with Checkpoints(tmp_path, keep_last=1, config=config) as checkpoints:
    checkpoints.save(7, make_state(7), score=0.5, run=run)
    checkpoints.wait()
    assert checkpoints.read_record(7).run == run
    record = checkpoints.read_record(7)
  assert (record.step, record.score) == (7, 0.5)
  assert record.config == {"seed": 5, "train": {"steps": 3}, "shape": [1, 2]}
  folder = tmp_path / "checkpoints" / "7"
  np.testing.assert_array_equal(
    read_leaf(folder, "opt_state/0/mu/encoder/kernel"), np.ones((24, 32))
  )
  with Checkpoints(tmp_path / "weights", keep_last=1) as checkpoints:
    state = make_state(7)
    checkpoints.save_variables(
      0, {"params": state.params, "batch_stats": state.batch_stats}
    )
    checkpoints.wait()
    assert checkpoints.read_record(0).run == {}


def test_another_model_is_rejected_before_anything_is_read(tmp_path):
  folder = save_run(tmp_path)
  target = make_target(make_state(6))
  encoder = target.params["encoder"]
  bias = jax.ShapeDtypeStruct(
    (4,), np.float16, sharding=encoder["bias"].sharding
  )
  wide = jax.ShapeDtypeStruct((24, 33), np.float32, sharding=bias.sharding)
  changed = {"encoder": {"kernel": wide, "bias": bias}}
  # Reading an array would fail.
  shutil.rmtree(folder / "params" / "ocdbt.process_0")
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(
      UserError,
      match=r"step 6 in \S+ is of another model: different: params/encoder/bias"
      r" is float32 there and float16 here, params/encoder/kernel has 24x32"
      r" there and 24x33 here; .* --config.init_from=\S+ and another"
      r" --workdir; --config.init_renames .* --config.init_drops",
    ):
      checkpoints.restore(6, dataclasses.replace(target, params=changed))
    renamed = {
      "encoder": {"kernels": encoder["kernel"], "bias": encoder["bias"]}
    }
    with pytest.raises(
      UserError,
      match=r"missing there: params/encoder/kernels \(near:"
      r" params/encoder/kernel\); unknown here: params/encoder/kernel;",
    ):
      checkpoints.restore(6, dataclasses.replace(target, params=renamed))
    with pytest.raises(
      UserError, match=r"unknown here: ema/batch_stats/norm/mea"
    ):
      checkpoints.restore_variables(
        6,
        {"params": target.params, "batch_stats": target.batch_stats},
        {"params": target.params, "batch_stats": {}},
      )
