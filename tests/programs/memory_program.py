"""Saves or restores 200 MB and prints the memory that this takes.

python -m tests.programs.memory_program FOLDER save|restore

Prints JSON, all values in MB.
"""

import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.state.train_state import TrainState

_ARRAYS, _SHAPE = 25, (2000, 1000)
SAVES = 20


def _memory(field: str) -> float:
  """Returns `VmRSS` or its maximum, `VmHWM`."""
  status = pathlib.Path("/proc/self/status").read_text()
  line = next(x for x in status.splitlines() if x.startswith(field))
  return int(line.split()[1]) / 1e3


def _state(step: int, params: dict[str, jax.Array]) -> TrainState:
  return TrainState(
    step=jnp.int32(step),
    params=params,
    batch_stats={},
    opt_state={},
    ema=None,
  )


def _save(folder: str) -> list[float]:
  """Returns the resident memory after each of 20 saves."""
  key = jax.random.key(0)
  params = {
    f"w{i}": jax.random.normal(jax.random.fold_in(key, i), _SHAPE)
    for i in range(_ARRAYS)
  }
  grow = jax.jit(
    lambda tree: jax.tree.map(lambda x: 1.001 * x, tree), donate_argnums=0
  )
  found = []
  with Checkpoints(folder, keep_last=2) as checkpoints:
    for step in range(1, SAVES + 1):
      params = grow(params)
      checkpoints.save(step, _state(step, params))
      checkpoints.wait()
      # Uncollected garbage is not a leak.
      gc.collect()
      found.append(_memory("VmRSS"))
  return found


def _restore(folder: str) -> dict[str, float]:
  """Returns the size of the state and the peak growth of memory."""
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def target(shape: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  state = _state(0, {})
  arrays = {f"w{i}": target(_SHAPE, jnp.float32) for i in range(_ARRAYS)}
  with Checkpoints(folder) as checkpoints:
    jax.block_until_ready(jax.device_put(state))
    before = _memory("VmRSS")
    read = checkpoints.restore(
      SAVES,
      TrainState(
        step=target((), jnp.int32),  # pyright: ignore[reportArgumentType]
        params=arrays,
        batch_stats={},
        opt_state={},
        ema=None,
      ),
    )
    jax.block_until_ready(read)
    peak = _memory("VmHWM") - before
  size = sum(x.nbytes for x in jax.tree.leaves(read)) / 1e6
  return {"size": size, "peak": peak}


if __name__ == "__main__":
  work = {"save": _save, "restore": _restore}[sys.argv[2]]
  print(json.dumps(work(sys.argv[1])))
