"""Helpers for tests of runs that start from another run's weights."""

import pathlib
from typing import Any

import jax
import numpy as np

from narvl_jax.checkpointing.runs import build_in, load_run
from narvl_jax.parallel import mesh_from_config
from narvl_jax.state.parameters import flatten
from narvl_jax.training.setup import Setup, build_setup
from narvl_jax.warm_start.init_from import init_from, plan_weights
from tests.evaluation.tiny_run import tiny_config


def make_setup(start: Any, words: Any = None, **changes: Any) -> Setup:
  """Returns the set-up of a run that starts from a folder.

  Args:
    start: run folder.
    words: folder with the vocabulary; default: `start`.
    **changes: config values; double underscores stand for dots.
  """
  config: Any = tiny_config().copy_and_resolve_references()
  config.init_from = str(start)
  config.train.batch_size = 8
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in changes.items()}
  )
  experiment = build_in(config, words or start)
  return build_setup(experiment, mesh_from_config(config.mesh))


def fresh_state(setup: Setup) -> Any:
  """Returns a random state with the shardings of the run."""
  rng = np.random.default_rng(3)

  def fill(leaf: Any, sharding: Any) -> jax.Array:
    values = rng.normal(size=leaf.shape).astype(leaf.dtype)
    return jax.device_put(values, sharding)

  return jax.tree.map(fill, setup.abstract_state, setup.shardings)


def started(setup: Setup) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
  """Returns the notes, and the variables before and after.

  Checks the sharding of every leaf.
  """
  notes = plan_weights(setup).notes
  state = fresh_state(setup)
  before = flatten(
    jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
  )
  with jax.set_mesh(setup.mesh):
    state = init_from(setup, state, plan_weights(setup))
  for x, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(setup.shardings), strict=True
  ):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)
  after = {"params": state.params, "batch_stats": state.batch_stats}
  return notes, before, flatten(jax.device_get(after))


def check_others(
  got: dict[str, Any], expected: dict[str, Any], but: set[str]
) -> None:
  """Checks all leaves except those in `but`."""
  assert but <= got.keys()
  for name in got.keys() - but:
    np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def stored_in(start: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the variables of a run."""
  _, variables, _ = load_run(start)
  return flatten(jax.device_get(variables))
