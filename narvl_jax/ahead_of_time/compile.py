"""Ahead-of-time compilation of a run for absent chips."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from narvl_jax.ahead_of_time.memory import (
  Memory,
  memory_of,
  needed_bytes,
  too_large,
)
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
    memory = too_large(setup, *needed)
    return Check(setup, topology, memory, None, time.monotonic() - start)
  seconds = time.monotonic() - start
  memory = memory_of(compiled, limit)
  text = compiled.as_text()
  return Check(setup, topology, memory, read_program(text), seconds, text)
