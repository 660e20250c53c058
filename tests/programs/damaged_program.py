"""Two processes save a state and resume from a damaged copy of it.

python -m tests.programs.damaged_program --folder=F --mode=save|resume
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from narvl_jax.checkpointing.checksums import device_checksums
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.command_line import cli
from narvl_jax.hosts import cluster
from narvl_jax.parallel import make_mesh, replicated
from narvl_jax.reliability import session as hosts
from narvl_jax.reliability.explain import explain_failure
from narvl_jax.run.start import restore_or_init
from narvl_jax.state.train_state import TrainState
from tests.support.saved import make_state


def _state(mesh: Mesh) -> tuple[TrainState, TrainState]:
  """Returns a state that is split over the processes, and its shardings."""
  values = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
  state = dataclasses.replace(make_state(1), params={"kernel": values})
  state = jax.device_get(state)
  shardings = jax.tree.map(
    lambda x: (
      NamedSharding(
        mesh, PartitionSpec("fsdp" if x.shape == values.shape else None)
      )
      if x.ndim
      else replicated(mesh)
    ),
    state,
  )

  def place(value: Any, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(
      value.shape, sharding, np.asarray(value).__getitem__
    )

  return jax.tree.map(place, state, shardings), shardings


def _run(folder: pathlib.Path, mode: str) -> None:
  mesh = make_mesh(1, jax.device_count(), 1)
  state, shardings = _state(mesh)
  setup: Any = SimpleNamespace(
    abstract_state=jax.eval_shape(lambda: state), shardings=shardings
  )
  say: Any = print
  with Checkpoints(folder / "run", keep_last=2) as checkpoints:
    if mode == "save":
      for step in (1, 2):
        checkpoints.save(step, state, run={"step": step})
      return
    read, step, run = restore_or_init(setup, checkpoints, say)
    found, saved = (device_checksums(jax.tree.leaves(x)) for x in (read, state))
    same = np.array_equal(found, saved)
    print(f"RESULT {step} {run['step']} {same}")
    checkpoints.save(2, read)


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
    _run(folder, flags.FLAGS.mode)


if __name__ == "__main__":
  flags.DEFINE_string("folder", None, "For the results.")
  flags.DEFINE_string("mode", None, "What to do.")
  cluster.define_flags()
  cli.run(main)
