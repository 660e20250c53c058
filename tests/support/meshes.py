"""One state on several meshes; as a program, in several processes.

`python -m tests.support.meshes --folder=F` restores the checkpoints in F,
one per mesh, onto a mesh of all processes, and saves one of its own.
"""

import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.tree_util import keystr

from narvl_jax.checkpointing.writing import Checkpoints, restore_target
from narvl_jax.command_line import cli
from narvl_jax.hosts import cluster
from narvl_jax.reliability import session as hosts
from narvl_jax.reliability.explain import explain_failure
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.setup import Setup
from narvl_jax.warm_start.init_from import init_from, plan_weights
from tests.support import runs

# Name -> (data, fsdp, tensor).
SHAPES = {"1x8": (1, 8, 1), "2x4": (2, 4, 1), "8x1": (8, 1, 1)}
# The mesh of the two processes; the axis fsdp spans both.
TOGETHER = (1, 8, 1)
STEP = 3


@functools.cache
def make_setup(shape: tuple[int, int, int], **settings: Any) -> Setup:
  """Returns a run with running statistics and moving averages."""
  return runs.setup(
    shape,
    model__image_encoder="resnet",
    optimizer__ema_decay=0.9,
    **settings,
  )


def values(name: str, leaf: Any) -> np.ndarray:
  """Returns random numbers that depend only on name and shape."""
  if leaf.shape == () and np.issubdtype(leaf.dtype, np.integer):
    return np.full((), STEP, leaf.dtype)
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.normal(size=leaf.shape).astype(leaf.dtype)


def make_state(setup: Setup) -> TrainState:
  """Returns a state with the shardings of the run."""

  def make(path: Any, leaf: Any, sharding: Any) -> jax.Array:
    whole = values(keystr(path), leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, whole.__getitem__)

  return jax.tree_util.tree_map_with_path(
    make, setup.abstract_state, setup.shardings
  )


def save(setup: Setup, folder: pathlib.Path) -> None:
  """Writes the state as the checkpoint of a run."""
  with jax.set_mesh(setup.mesh), Checkpoints(folder, keep_last=1) as store:
    store.save(STEP, make_state(setup))
    store.wait()


def restore(setup: Setup, folder: pathlib.Path) -> TrainState:
  """Restores the state with the shardings of a run."""
  with jax.set_mesh(setup.mesh), Checkpoints(folder) as store:
    target = restore_target(setup.abstract_state, setup.shardings)
    return store.restore(STEP, target)


def wrong_leaves(
  setup: Setup,
  state: TrainState,
  expected: Callable[[str, Any], np.ndarray] = values,
) -> list[str]:
  """Returns the names of leaves with wrong values, dtype or sharding.

  Args:
    setup: determines the shardings.
    state: each process checks its addressable shards.
    expected: name and shape -> values.
  """
  wrong = []

  def check(path: Any, leaf: jax.Array, like: Any, sharding: Any) -> None:
    whole = expected(keystr(path), like)
    right = leaf.dtype == like.dtype and leaf.sharding.is_equivalent_to(
      sharding, leaf.ndim
    )
    for shard in leaf.addressable_shards:
      part = np.asarray(shard.data)
      right &= part.tobytes() == whole[shard.index].tobytes()
    if not right:
      wrong.append(keystr(path))

  jax.tree_util.tree_map_with_path(
    check, state, setup.abstract_state, setup.shardings
  )
  return wrong


def start_with_more_queries(folder: pathlib.Path) -> tuple[str, list[str]]:
  """Starts a run from what was saved; returns the note and wrong leaves."""
  setup = make_setup(
    TOGETHER, model__num_queries=runs.QUERIES + 2, init_from=str(folder)
  )
  with jax.set_mesh(setup.mesh):
    plan = plan_weights(setup)
    (note,) = plan.notes
    state = init_from(setup, make_state(setup), plan)

  def expected(name: str, leaf: Any) -> np.ndarray:
    fresh = values(name, leaf)
    if not name.startswith((".params", ".batch_stats", ".ema")):
      return fresh
    # Averages are preferred to parameters, also as the start of averages.
    stored = name if name.startswith(".ema") else _average(name)
    if not name.endswith("['query_embed']"):
      return values(stored, leaf)
    shape = jax.ShapeDtypeStruct((runs.QUERIES, *leaf.shape[1:]), leaf.dtype)
    fresh = values(".params['decoder']['query_embed']", leaf)
    return np.concatenate([values(stored, shape), fresh[runs.QUERIES :]])

  return note, wrong_leaves(setup, state, expected)


def _average(name: str) -> str:
  """Returns the name of the average of `.params[...]`."""
  collection, _, rest = name.removeprefix(".").partition("[")
  return f".ema['{collection}'][{rest}"


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  folder = pathlib.Path(flags.FLAGS.folder)
  with hosts.together(
    cluster.detect(flags.FLAGS),
    folder / "logs",
    lambda: {"version jax": jax.__version__},
    lambda error: explain_failure(error, folder),
    print,
  ):
    wrong = {}
    setup = make_setup(TOGETHER)
    for name in SHAPES:
      wrong[name] = wrong_leaves(setup, restore(setup, folder / name))
    save(setup, folder / "together")
    wrong["together"] = wrong_leaves(setup, restore(setup, folder / "together"))
    note, wrong["start"] = start_with_more_queries(folder / "8x1")
    print(note)
    file = folder / f"wrong{jax.process_index()}.json"
    file.write_text(json.dumps(wrong))


if __name__ == "__main__":
  flags.DEFINE_string("folder", None, "For the results.")
  cluster.define_flags()
  cli.run(main)
