"""Small states, their checkpoints, and ways to damage them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from narvl_jax.checkpointing.writing import Checkpoints, restore_target
from narvl_jax.parallel import make_mesh, replicated
from narvl_jax.state.train_state import TrainState


def make_state(step: int, *, ema: bool = True) -> TrainState:
  """Returns random values in the tree structure of a run."""
  rng = np.random.default_rng(step)

  def random(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))

  # Values above 1 kB are in separate files, others between names.
  params = {"encoder": {"kernel": random(24, 32), "bias": random(4)}}
  trained = {"encoder": {"kernel": params["encoder"]["kernel"]}}
  optimizer = optax.adam(1e-3)
  stats = {"norm": {"mean": random(4)}}
  averages = {
    "params": {"encoder": {"kernel": random(24, 32)}},
    "batch_stats": {"norm": {"mean": random(4)}},
  }
  return TrainState(
    step=jnp.int32(step),
    params=params,
    batch_stats=stats,
    opt_state=jax.tree.map(lambda x: x + 1, optimizer.init(trained)),
    ema=averages if ema else None,
  )


def make_target(state: TrainState) -> TrainState:
  """Returns shapes and shardings for restoring onto all devices."""
  abstract = jax.eval_shape(lambda: state)
  where = replicated(make_mesh())
  return restore_target(abstract, jax.tree.map(lambda _: where, abstract))


def save_run(
  folder: pathlib.Path, steps: tuple[int, ...] = (3, 6)
) -> pathlib.Path:
  """Saves states of several steps; returns the folder of the last one."""
  with Checkpoints(folder, keep_last=len(steps)) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), run={"position": step})
  return folder / "checkpoints" / str(steps[-1])


def files_of(folder: pathlib.Path) -> list[str]:
  """Returns all files below a folder, sorted."""
  files = (x for x in folder.rglob("*") if x.is_file())
  return sorted(x.relative_to(folder).as_posix() for x in files)


def flip_bit(path: pathlib.Path, bit: int) -> None:
  """Flips one bit of a file."""
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << (bit % 8)
  path.write_bytes(data)


def assert_equal(a: object, b: object) -> None:
  """Checks that two trees are the same, bit by bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)
