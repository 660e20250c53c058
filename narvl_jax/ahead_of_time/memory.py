"""Memory that a program needs on one device, and how to need less."""

import dataclasses
import re
from typing import Any

import jax

from narvl_jax.models.encoder import nearest_side
from narvl_jax.parallel import data_parallel_size
from narvl_jax.training.setup import Setup

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Classes of a chunk of the loss, the default of `loss.chunk_size`.
_CHUNK_SIZE = 4096
# Error messages of the compiler for programs that are too large.
_TOO_LARGE = (
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE),
  re.compile(
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
  ),
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one chip.

  Attributes:
    arguments: state and batch.
    temporaries: temporary memory of a step.
    total: both, the program's code, and results that alias no argument.
    limit: memory of the chip.
  """

  arguments: int
  temporaries: int
  total: int
  limit: int

  @property
  def fits(self) -> bool:
    """Whether the step can run."""
    return self.total <= self.limit


def needed_bytes(message: str) -> tuple[int, int] | None:
  """Returns (needed, available) bytes from an error of XLA, None if other."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  for pattern in _TOO_LARGE:
    found = pattern.search(message)
    if found:
      used, unit, limit, limit_unit = found.groups()
      return (
        int(float(used) * _UNITS[unit.upper()]),
        int(float(limit) * _UNITS[limit_unit.upper()]),
      )
  return None


def memory_of(compiled: Any, limit: int) -> Memory:
  """Returns the memory of a compiled program on a chip with `limit` bytes."""
  analysis = compiled.memory_analysis()
  arguments = analysis.argument_size_in_bytes
  temporaries = analysis.temp_size_in_bytes
  extra = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  extra += analysis.generated_code_size_in_bytes
  total = arguments + temporaries + extra
  return Memory(arguments, temporaries, total, limit)


def too_large(setup: Setup, needed: int, limit: int) -> Memory:
  """Returns the memory of a failed compilation."""
  rows = jax.tree.leaves(setup.batch)
  per_device = sum(x.size * x.dtype.itemsize for x in rows)
  per_device //= data_parallel_size(setup.mesh)
  arguments = setup.state_bytes_per_device + per_device
  if setup.teacher is not None:
    arguments += setup.teacher.bytes_per_device
  # One form of the message has only the temporaries.
  total = max(needed, arguments)
  return Memory(arguments, total - arguments, total, limit)


def advice(setup: Setup, memory: Memory | None = None) -> list[str]:
  """Returns flags that reduce the memory of the update, in the order to try.

  Args:
    setup: the run.
    memory: what its update needs; None if unknown.
  """
  config, model = setup.experiment.config, setup.experiment.model_config
  flags = []
  if steps := _accumulation_steps(setup, memory):
    flags.append(f"--config.train.accumulation_steps={steps}")
  if model.remat != "full":
    flags.append("--config.model.remat=full")
  flags += _more_fsdp(setup, memory)
  sides = [nearest_side(model, 3 * x // 4) for x in config.data.image_size]
  if all(map(int.__lt__, sides, config.data.image_size)):
    flags.append(f"--config.data.image_size='({sides[0]},{sides[1]})'")
  chunk = config.loss.chunk_size or model.padded_vocab_size
  parallel = not setup.experiment.autoregressive
  if parallel and chunk > _CHUNK_SIZE < model.padded_vocab_size:
    flags.append(f"--config.loss.chunk_size={_CHUNK_SIZE}")
  return flags


def _more_fsdp(setup: Setup, memory: Memory | None) -> list[str]:
  """Returns the flag that shards the state more, if that can help."""
  mesh = setup.mesh
  fsdp, size = mesh.shape["fsdp"], mesh.size // mesh.shape["tensor"]
  small = memory is not None and memory.arguments <= memory.limit // 4
  if small or fsdp == size:
    return []
  return [f"--config.mesh.fsdp={min(2 * fsdp, size)}"]


def _accumulation_steps(setup: Setup, memory: Memory | None) -> int | None:
  """Returns the fewest micro-batches whose rows fit; None for one row."""
  train = setup.experiment.config.train
  steps = train.accumulation_steps
  rows = train.batch_size // data_parallel_size(setup.mesh) // steps
  fewer = rows // 2
  if memory is not None:
    room = (memory.limit - memory.arguments) / max(memory.temporaries, 1)
    fewer = min(int(0.9 * room * rows), rows - 1)
  for factor in range(2, rows + 1):
    if rows % factor == 0 and rows // factor <= max(fewer, 1):
      return factor * steps
  return None
