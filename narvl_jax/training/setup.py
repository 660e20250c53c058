"""Shapes, shardings and jitted functions of a run, before any array exists."""

import dataclasses
from typing import Any

import jax
import optax
from flax.linen import meta
from jax.sharding import Mesh

from narvl_jax.experiment.experiment import Experiment
from narvl_jax.parallel import (
  batch_sharding,
  check_batch_size,
  data_parallel_size,
  place,
  replicated,
  sharding_table,
)
from narvl_jax.state.parameters import ParameterRule, assign_rules, flatten
from narvl_jax.state.train_state import (
  TrainState,
  bytes_per_device,
  make_first_state,
  make_init,
  state_shardings,
)
from narvl_jax.terminal.tables import format_columns
from narvl_jax.training.flops import UPDATE_FACTOR, forward_flops
from narvl_jax.training.run_inputs import (
  RunInputs,
  input_shapes,
  input_shardings,
  read_inputs,
)
from narvl_jax.training.teacher import Teacher, find_teacher
from narvl_jax.training.train_step import (
  Batch,
  Metrics,
  batch_spec,
)
from narvl_jax.training.update import make_update, optimizer_of


@dataclasses.dataclass(frozen=True)
class Setup:
  """Shapes, shardings and functions of a run.

  Attributes:
    experiment: config, vocabulary, tasks and model.
    mesh: the devices.
    rules: optimizer rule of every parameter.
    abstract_state: shapes of the state.
    shardings: shardings of the state.
    batch: shapes of a batch.
    init: jitted, key -> state.
    program: jitted update, (inputs, state, batch) -> (state, metrics); the
      state is donated. `read_inputs` returns the inputs.
    teacher: for distillation; None for none.
  """

  experiment: Experiment
  mesh: Mesh
  rules: dict[str, ParameterRule]
  abstract_state: TrainState
  shardings: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  init: Any
  program: Any
  teacher: Teacher | None = None

  def trace_step(self) -> jax.stages.Traced:
    """Traces the update for the shape of the batches."""
    inputs = input_shapes(self.teacher)
    with jax.set_mesh(self.mesh):
      return self.program.trace(inputs, self.abstract_state, self.batch)

  def compile_step(self) -> jax.stages.Compiled:
    """Compiles the update for the shape of the batches."""
    with jax.set_mesh(self.mesh):
      return self.trace_step().lower().compile()

  def read_inputs(self) -> RunInputs:
    """Returns the first argument of `program`; reads a teacher's weights."""
    return read_inputs(self.experiment.config, self.teacher, self.mesh)

  def train_step(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    """Makes one update; see `program`."""
    return self.program(self.read_inputs(), state, batch)

  @property
  def num_parameters(self) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(self.abstract_state.params))

  @property
  def num_frozen(self) -> int:
    """Number of parameters that are not trained."""
    return sum(
      leaf.size
      for path, leaf in flatten(self.abstract_state.params).items()
      if self.rules[path].freeze
    )

  @property
  def state_bytes_per_device(self) -> int:
    """Bytes of the state on one device."""
    return bytes_per_device(self.abstract_state, self.shardings)

  def step_flops(self) -> float:
    """Returns the operations of an update; see `training.flops`."""
    data = self.experiment.config.data
    size, text = tuple(data.image_size), data.max_text_length
    rows = self.experiment.config.train.batch_size
    answer = self.experiment.answer_positions
    flops = UPDATE_FACTOR * forward_flops(
      self.experiment.model_config, size, text, rows, answer
    )
    if self.teacher is not None:
      config, answer = self.teacher.model.config, self.teacher.answer_positions
      flops += forward_flops(config, size, text, rows, answer)
    return flops

  def sharding_table(self) -> str:
    """Returns the placement of every parameter and the bytes per device."""
    mesh_shape, rules = self.mesh.shape, self.experiment.config.mesh.rules
    boxed = self.experiment.abstract_variables(self.mesh)
    table = sharding_table(place(boxed, mesh_shape, rules), mesh_shape, rules)
    state = f"{self.state_bytes_per_device:,}"
    return f"{table}\nwhole training state: {state} bytes a device"

  def parameter_table(self) -> str:
    """Returns a line per parameter: name, shape, count, rate and decay."""
    rows = [("parameter", "shape", "count", "lr", "decay")]
    for path, leaf in flatten(self.abstract_state.params).items():
      rule = self.rules[path]
      lr, decay = f"{rule.lr:g}", f"{rule.decay:g}"
      if rule.rows is not None:
        lr += f" rows {rule.rows[0]}:{rule.rows[1]}"
      if rule.freeze:
        lr, decay = "frozen", "-"
      shape = "x".join(map(str, leaf.shape)) or "scalar"
      rows.append((path, shape, f"{leaf.size:,}", lr, decay))
    return format_columns(rows, left=2, rule=False, indent="  ")


def build_setup(experiment: Experiment, mesh: Mesh) -> Setup:
  """Derives shapes, shardings and functions from the config.

  Raises:
    UserError: the batch does not divide, or a rule of the optimizer is wrong.
  """
  config = experiment.config
  data, train = config.data, config.train
  check_batch_size(
    train.batch_size, mesh, accumulation_steps=train.accumulation_steps
  )
  image_size = tuple(data.image_size)
  boxed = experiment.abstract_variables(mesh)
  paths = list(flatten(meta.unbox(boxed)["params"]))
  rules = assign_rules(config.optimizer.rules, paths)

  def optimizer_at(
    learning_rate: Any,
  ) -> tuple[optax.Schedule, optax.GradientTransformation]:
    return optimizer_of(config, learning_rate, boxed["params"], rules)

  _, optimizer = optimizer_at(config.optimizer.learning_rate)
  first_state = make_first_state(
    optimizer, rules, ema=config.optimizer.ema_decay > 0
  )
  init = make_init(
    experiment.model,
    first_state,
    image_size=image_size,
    text_length=data.max_text_length,
  )
  # From shapes that are known: tracing the model again takes a second or more.
  abstract_state = jax.eval_shape(first_state, meta.unbox(boxed))
  shardings = state_shardings(abstract_state, boxed, mesh, config.mesh.rules)
  teacher = find_teacher(experiment, mesh)
  train_step = make_update(experiment, teacher, optimizer_at, rules)
  return Setup(
    experiment=experiment,
    mesh=mesh,
    rules=rules,
    abstract_state=abstract_state,
    shardings=shardings,
    batch=batch_spec(
      train.batch_size,
      image_size,
      data.max_text_length,
      experiment.label_length,
    ),
    init=jax.jit(
      init, out_shardings=shardings, compiler_options=_init_options()
    ),
    program=jax.jit(
      train_step,
      donate_argnums=1,
      in_shardings=(
        input_shardings(teacher, mesh),
        shardings,
        batch_sharding(mesh),
      ),
      out_shardings=(shardings, replicated(mesh)),
      compiler_options=_step_options(mesh),
    ),
    teacher=teacher,
  )


def _step_options(mesh: Mesh) -> dict[str, Any] | None:
  """Returns compiler options of the update.

  On TPUs they disable windowed einsums. These turn products with sharded
  weights into loops that pass parts from chip to chip, which take long to
  compile and prevent a single reduce-scatter of the gradients.
  """
  if mesh.devices.flat[0].platform == "tpu":
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
  return None


def _init_options() -> dict[str, Any] | None:
  """Returns compiler options of the initialisation, which runs once."""
  # On a CPU, optimising its random numbers takes longer than it saves.
  if jax.default_backend() == "cpu":
    return {"xla_backend_optimization_level": 0}
  return None


def describe_parallelism(setup: Setup) -> str:
  """Returns how a batch is split, such as `batch 128 = 8 x 16`.

  The first factor is the data-parallel size.
  """
  parts = data_parallel_size(setup.mesh)
  steps = setup.experiment.config.train.accumulation_steps
  size = setup.experiment.config.train.batch_size
  text = f"batch {size}"
  if parts * steps > 1:
    text += f" = {parts} x {size // parts // steps}"
  return text + (f" x {steps} accumulation steps" if steps > 1 else "")
