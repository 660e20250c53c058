"""Ahead-of-time compilation of a run for absent chips."""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from narvl_jax.ahead_of_time.program import Program, read_program
from narvl_jax.ahead_of_time.topology import Topology
from narvl_jax.decoding import (
  Decoding,
  cast_parameters,
  make_steps,
  prepare_variables,
)
from narvl_jax.experiment.create import create
from narvl_jax.parallel import (
  activation_rules,
  batch_sharding,
  data_parallel_size,
  mesh_from_config,
)
from narvl_jax.prediction.readers import answer_lengths, make_reader
from narvl_jax.training.setup import Setup, build_setup

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
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


@dataclasses.dataclass(frozen=True)
class Check:
  """A compiled step.

  Attributes:
    setup: shapes and shardings of the run.
    topology: the chips it was compiled for.
    memory: of a chip.
    program: its counts; None if it does not fit.
    seconds: time of the compilation.
    text: of the program.
  """

  setup: Setup
  topology: Topology
  memory: Memory
  program: Program | None
  seconds: float
  text: str = ""

  @property
  def formula_flops(self) -> float:
    """Operations of an update on one chip, by `training.flops`."""
    return self.setup.step_flops() / self.setup.mesh.size

  @property
  def compute_seconds(self) -> float | None:
    """The compiler's estimate, and ours of the Pallas kernels; see `costs`."""
    if self.program is None:
      return None
    chip = self.topology.chip
    return sum(line.seconds(chip) for line in self.program.lines)

  def network_bytes(self) -> tuple[float, float]:
    """Returns bytes that a chip receives from its slice and from others."""
    collectives = self.program.collectives if self.program else ()
    block = self.setup.mesh.size // self.topology.num_slices
    traffic = [found.traffic(block) for found in collectives]
    return sum(t[0] for t in traffic), sum(t[1] for t in traffic)

  @property
  def communication_seconds(self) -> float | None:
    """Bytes over bandwidth, a lower bound: all links work at the same time.

    Published bandwidths include both directions, hence the half. None if the
    bandwidth between slices is unknown, or the exchange between slices is not
    a collective in the text of the program.
    """
    if self.program is None:
      return None
    chip, (inside, across) = self.topology.chip, self.network_bytes()
    seconds = inside / (chip.ici_bandwidth / 2)
    if not across and self.topology.num_slices == 1:
      return seconds
    if not across or chip.dcn_bandwidth is None:
      return None
    return seconds + across / chip.dcn_bandwidth

  def utilisation(self, seconds: float) -> float:
    """Returns the MFU of a step of this duration."""
    return self.formula_flops / (self.topology.chip.peak_flops * seconds)


def check_train_step(config: Any, topology: Topology) -> Check:
  """Compiles the train step of a config.

  Args:
    config: see `narvl_jax.experiment.config.default_config`; "auto" activations
      are bfloat16.
    topology: from `get_topology`.

  Raises:
    UserError: the config is wrong, or its mesh does not fit the chips.
  """
  config = config.copy_and_resolve_references()
  if config.model.dtype == "auto":
    # "auto" would follow the backend, a CPU.
    config.model.dtype = "bfloat16"
  experiment = create(config, shapes_only=True)
  mesh = mesh_from_config(config.mesh, topology.devices)
  setup = build_setup(experiment, mesh)
  return _check(setup, topology, setup.compile_step)


def check_predict_step(train: Check) -> Check:
  """Compiles the predict step of the same run for the same chips."""
  setup = train.setup
  return _check(
    setup, train.topology, lambda: lower_predict_step(setup).compile()
  )


def predict_batch_size(setup: Setup) -> int:
  """Returns `evaluation.batch_size`, rounded up to divide over the devices."""
  parts = data_parallel_size(setup.mesh)
  return -(-setup.experiment.config.evaluation.batch_size // parts) * parts


def lower_predict_step(setup: Setup) -> jax.stages.Lowered:
  """Lowers the predict step, with the weights sharded as in training."""
  experiment, mesh = setup.experiment, setup.mesh
  config = experiment.config
  # All tasks share the program, unless the decoder reads prompts of some.
  name = next(iter(config.tasks))
  # Hashable, which its type does not declare.
  model: Any = experiment.model
  steps = make_steps(
    model,
    make_reader(experiment, name, Decoding()),
    activation_rules(config.mesh.rules),
  )
  state, shardings = setup.abstract_state, setup.shardings

  def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  variables = {
    name: jax.tree.map(placed, getattr(state, name), getattr(shardings, name))
    for name in ("params", "batch_stats")
  }
  rows = predict_batch_size(setup)
  batch: dict[str, Any] = {
    name: placed(
      jax.ShapeDtypeStruct((rows, *spec.shape[1:]), spec.dtype),
      batch_sharding(mesh),
    )
    for name, spec in setup.batch.items()
    if name in ("image", "text", "image_mask")
  }
  batch["merge_repeats"] = batch["image_mask"]
  batch["lengths"] = answer_lengths(experiment, Decoding())

  def predict(variables: Any, batch: Any) -> Any:
    prepared = prepare_variables(experiment.model, variables)
    return steps.predict(prepared, **batch)

  variables = cast_parameters(model.config, variables)
  with jax.set_mesh(mesh):
    return jax.jit(predict).lower(variables, batch)


def _check(
  setup: Setup, topology: Topology, compile_: Callable[[], Any]
) -> Check:
  limit, start = topology.chip.hbm_bytes, time.monotonic()
  try:
    compiled = compile_()
  except jax.errors.JaxRuntimeError as error:
    needed = needed_bytes(str(error))
    if needed is None:
      raise
    memory = _too_large(setup, *needed)
    return Check(setup, topology, memory, None, time.monotonic() - start)
  seconds = time.monotonic() - start
  analysis = compiled.memory_analysis()
  arguments = analysis.argument_size_in_bytes
  temporaries = analysis.temp_size_in_bytes
  extra = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  extra += analysis.generated_code_size_in_bytes
  memory = Memory(
    arguments, temporaries, arguments + temporaries + extra, limit
  )
  text = compiled.as_text()
  return Check(setup, topology, memory, read_program(text), seconds, text)


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


def _too_large(setup: Setup, needed: int, limit: int) -> Memory:
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


def advice(setup: Setup, memory: Memory) -> list[str]:
  """Returns flags that reduce memory, those that cost least speed first."""
  config, mesh = setup.experiment.config, setup.mesh
  flags = []
  if setup.experiment.model_config.remat != "full":
    flags.append("--config.model.remat=full")
  parts = data_parallel_size(mesh)
  fsdp, size = mesh.shape["fsdp"], mesh.size // mesh.shape["tensor"]
  if memory.arguments > memory.limit // 4 and fsdp < size:
    flags.append(f"--config.mesh.fsdp={min(2 * fsdp, size)}")
  steps = config.train.accumulation_steps
  rows = config.train.batch_size // parts // steps
  room = (memory.limit - memory.arguments) / max(memory.temporaries, 1)
  fewer = min(int(0.9 * room * rows), rows - 1)
  if fewer >= 1:
    flags.append(f"--config.train.batch_size={fewer * parts * steps}")
  # The fewest micro-batches whose rows fit.
  for factor in range(2, rows + 1):
    if rows % factor == 0 and rows // factor <= max(fewer, 1):
      flags.append(f"--config.train.accumulation_steps={factor * steps}")
      break
  return flags
