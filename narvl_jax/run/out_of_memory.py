"""What did not fit into the memory of a device, and what to change."""

import contextlib
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from narvl_jax.ahead_of_time.memory import (
  Memory,
  advice,
  memory_of,
  needed_bytes,
  too_large,
)
from narvl_jax.ahead_of_time.program import read_program
from narvl_jax.errors import UserError
from narvl_jax.parallel import data_parallel_size
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run_folder.metrics import format_bytes
from narvl_jax.terminal.tables import format_columns
from narvl_jax.training.setup import Setup

FOLDER = "out_of_memory"
_CODE = "RESOURCE_EXHAUSTED"
# Arrays in the file.
_MOST_ARRAYS = 30
_REQUEST = re.compile(
  r"allocat\w+\s+(?P<size>[\d.]+)\s*(?P<unit>[KMGT]?)i?B?\b", re.I
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@contextlib.contextmanager
def explained(
  setup: Setup,
  workdir: pathlib.Path,
  ledger: Ledger,
  program: jax.stages.Compiled | None = None,
) -> Iterator[None]:
  """Explains an error of the block that a device has too little memory.

  Writes `out_of_memory/host_000.txt`, the largest arrays, and
  `host_000.prof`, what JAX has allocated (for pprof), into the run folder.

  Args:
    setup: the run.
    workdir: the run folder.
    ledger: has the stage of the error.
    program: the update, if it is compiled.

  Raises:
    UserError: with the size, the files, and flags to change.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if _CODE not in str(error):
      raise
    stage, step, _ = ledger.status
    memory = _memory(setup, str(error), program)
    where = f'out of memory in phase "{stage}" at step {step}'
    file = _write(setup, workdir, f"{where}\n{error}\n", memory, program)
    raise UserError(
      f"{where}: {_size(str(error), memory)}; try"
      f" {', then '.join(_remedies(setup, stage, memory))}; largest arrays:"
      f" {file}"
    ) from error


def _memory(
  setup: Setup, message: str, program: jax.stages.Compiled | None
) -> Memory | None:
  """Returns what the update needs; None if that or the limit is unknown."""
  if needed := needed_bytes(message):
    return too_large(setup, *needed)
  stats = setup.mesh.local_devices[0].memory_stats() or {}
  limit = stats.get("bytes_limit")
  if program is None or not limit:
    return None
  return memory_of(program, limit)


def _size(message: str, memory: Memory | None) -> str:
  """Returns in words what did not fit."""
  if memory is not None:
    return (
      f"the update needs {format_bytes(memory.total)} a device, of"
      f" {format_bytes(memory.limit)}"
    )
  found = _REQUEST.search(message)
  if found is None:
    return " ".join(message.split())[:200]
  size = float(found["size"]) * _UNITS[found["unit"].upper()]
  return f"an array or program of {format_bytes(size)} could not be allocated"


def _remedies(setup: Setup, stage: str, memory: Memory | None) -> list[str]:
  """Returns flags to change, in the order to try."""
  if stage == "evaluation":
    rows = setup.experiment.config.evaluation.batch_size
    if rows > 1:
      return [f"--config.evaluation.batch_size={rows // 2}"]
  flags = advice(setup, memory)
  if stage not in ("compile", "step", "data wait"):
    # The state itself does not fit.
    flags = [flag for flag in flags if flag.startswith("--config.mesh")]
  return flags or ["devices with more memory"]


def _write(
  setup: Setup,
  workdir: pathlib.Path,
  head: str,
  memory: Memory | None,
  program: jax.stages.Compiled | None,
) -> pathlib.Path:
  """Writes the files of this host; returns the one for people."""
  folder = workdir / FOLDER
  path = folder / f"host_{jax.process_index():03d}.txt"
  if memory is not None:
    head += (
      f"\nupdate, bytes a device: arguments {format_bytes(memory.arguments)},"
      f" temporaries {format_bytes(memory.temporaries)}\n"
    )
  text = "\n".join([head, *_tables(setup, program)])
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")
    profile = jax.profiler.device_memory_profile()
    path.with_suffix(".prof").write_bytes(profile)
  return path


def _tables(setup: Setup, program: jax.stages.Compiled | None) -> Iterator[str]:
  """Yields the largest arrays of the state and of the update."""
  rows = sorted(_state_rows(setup), reverse=True)[:_MOST_ARRAYS]
  yield "largest arrays of the state and the batch, on one device:"
  yield format_columns(
    [("size", "shape", "name"), *((format_bytes(x), *row) for x, *row in rows)],
    left=3,
  )
  if program is None:
    return
  arrays = read_program(program.as_text()).arrays
  largest = sorted(arrays, key=lambda array: -array.bytes)[:_MOST_ARRAYS]
  yield "\nlargest arrays within the update, on one device, and what makes one:"
  yield format_columns(
    [("size", "type", "operation")]
    + [
      (
        format_bytes(array.bytes),
        f"{array.dtype}[{','.join(map(str, array.shape))}]",
        max(arrays[array], key=len) or "unnamed copy",
      )
      for array in largest
    ],
    left=3,
  )


def _state_rows(setup: Setup) -> Iterator[tuple[int, str, str]]:
  """Yields bytes on one device, shape and name of every array."""
  parts = data_parallel_size(setup.mesh)
  for name, spec in setup.batch.items():
    shape = (spec.shape[0] // parts, *spec.shape[1:])
    yield _row(f"batch/{name}", shape, spec.dtype)
  state = jax.tree.leaves_with_path(setup.abstract_state)
  shardings = jax.tree.leaves(setup.shardings)
  for (path, leaf), sharding in zip(state, shardings, strict=True):
    shape = sharding.shard_shape(leaf.shape)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    yield _row(name, shape, leaf.dtype)


def _row(name: str, shape: tuple[int, ...], dtype: Any) -> tuple[int, str, str]:
  size = math.prod(shape) * dtype.itemsize
  return size, f"{dtype}[{','.join(map(str, shape))}]", name
