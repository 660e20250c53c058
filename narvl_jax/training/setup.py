"""Shapes, shardings and jitted functions of a run, before any array exists."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax
from flax.linen import meta
from jax.sharding import Mesh

from narvl_jax.data.example import TASKS
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.parallel import (
  BATCH_AXES,
  VOCAB_AXIS,
  WIDTH_AXIS,
  activation_rules,
  batch_sharding,
  check_batch_size,
  data_parallel_size,
  place,
  replicated,
  sharding_table,
)
from narvl_jax.query_ctc import MeshAxes
from narvl_jax.state.parameters import ParameterRule, assign_rules, flatten
from narvl_jax.state.train_state import (
  TrainState,
  bytes_per_device,
  make_first_state,
  make_init,
  state_shardings,
)
from narvl_jax.terminal.tables import format_columns
from narvl_jax.training.constrained import answer_constraints
from narvl_jax.training.flops import UPDATE_FACTOR, forward_flops
from narvl_jax.training.objective import (
  AutoregressiveLoss,
  DistillationLoss,
  Objective,
  QueryCtcLoss,
)
from narvl_jax.training.optimizer import (
  make_optimizer,
  make_schedule,
  matrix_axes,
)
from narvl_jax.training.teacher import Teacher, find_teacher
from narvl_jax.training.train_step import (
  Batch,
  Metrics,
  StepConfig,
  batch_spec,
  make_train_step,
)

# Arguments of `make_optimizer` that are keys of the config.
_OF_OPTIMIZER = "weight_decay", "b1", "b2", "eps", "eps_placement", "clip_norm"


@dataclasses.dataclass(frozen=True)
class Setup:
  """Shapes, shardings and functions of a run.

  Attributes:
    experiment: config, vocabulary, tasks and model.
    mesh: the devices.
    rules: optimizer rule of every parameter.
    schedule: step -> learning rate.
    abstract_state: shapes of the state.
    shardings: shardings of the state.
    batch: shapes of a batch.
    init: jitted, key -> state.
    train_step: jitted, (state, batch) -> (state, metrics); the state is
      donated. With a teacher, its variables come first: (variables, state,
      batch).
    teacher: for distillation; None for none.
  """

  experiment: Experiment
  mesh: Mesh
  rules: dict[str, ParameterRule]
  schedule: optax.Schedule
  abstract_state: TrainState
  shardings: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  init: Any
  train_step: Any
  teacher: Teacher | None = None

  def trace_step(self) -> jax.stages.Traced:
    """Traces the update for the shape of the batches."""
    given = () if self.teacher is None else (self.teacher.shapes,)
    with jax.set_mesh(self.mesh):
      return self.train_step.trace(*given, self.abstract_state, self.batch)

  def compile_step(self) -> jax.stages.Compiled:
    """Compiles the update for the shape of the batches."""
    with jax.set_mesh(self.mesh):
      return self.trace_step().lower().compile()

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
  schedule, optimizer = _make_optimizer(config, boxed["params"], rules)
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
  train_step = _make_step(experiment, teacher, optimizer, schedule, rules)
  # As constants, the weights of a teacher would be part of the program.
  of_teacher = () if teacher is None else (teacher.shardings,)
  return Setup(
    experiment=experiment,
    mesh=mesh,
    rules=rules,
    schedule=schedule,
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
    train_step=jax.jit(
      train_step,
      donate_argnums=len(of_teacher),
      in_shardings=(*of_teacher, shardings, batch_sharding(mesh)),
      out_shardings=(shardings, replicated(mesh)),
      compiler_options=_step_options(mesh),
    ),
    teacher=teacher,
  )


def _make_optimizer(
  config: Any, boxed: Any, rules: dict[str, ParameterRule]
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Returns schedule and optimizer of a config for boxed parameters."""
  optim = config.optimizer
  schedule = make_schedule(
    learning_rate=optim.learning_rate,
    schedule=optim.schedule,
    warmup_steps=optim.warmup_steps,
    steps=config.train.steps,
  )
  return schedule, make_optimizer(
    schedule,
    rules,
    matrices=matrix_axes(boxed) if optim.name == "muon" else None,
    **{name: optim[name] for name in _OF_OPTIMIZER},
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


def _make_step(
  experiment: Experiment,
  teacher: Teacher | None,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  rules: dict[str, ParameterRule],
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns the update of a config, see `Setup.train_step`."""
  config = experiment.config
  of_labels = make_objective(experiment)

  def update(
    objective: Objective, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    settings = StepConfig(
      seed=config.seed,
      task_names=TASKS,
      objective=objective,
      accumulation_steps=config.train.accumulation_steps,
      ema_decay=config.optimizer.ema_decay,
      ema_warmup=config.optimizer.ema_warmup,
    )
    train_step = make_train_step(
      experiment.model, optimizer, schedule, rules, settings
    )
    # Gives the modules' logical axes of activations a meaning.
    with nn.logical_axis_rules(activation_rules(config.mesh.rules)):
      return train_step(state, batch)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    return update(of_labels, state, batch)

  def student_step(
    variables: Any, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    assert isinstance(of_labels, QueryCtcLoss)
    assert teacher is not None
    objective = DistillationLoss(
      of_labels,
      teacher,
      variables,
      weight=config.distillation.weight,
      temperature=config.distillation.temperature,
    )
    return update(objective, state, batch)

  return train_step if teacher is None else student_step


def make_objective(
  experiment: Experiment,
) -> QueryCtcLoss | AutoregressiveLoss:
  """Returns the loss of the labels, without a teacher.

  Raises:
    UserError: see `answer_constraints`.
  """
  loss, vocabulary = experiment.config.loss, experiment.vocabulary
  if not experiment.autoregressive:
    return QueryCtcLoss(
      blank_id=vocabulary.blank_id,
      vocab_size=vocabulary.size,
      label_smoothing=loss.label_smoothing,
      confidence_mode=loss.confidence,
      chunk_size=loss.chunk_size,
      axes=MeshAxes(batch=BATCH_AXES, vocab=VOCAB_AXIS, width=WIDTH_AXIS),
    )
  return AutoregressiveLoss(
    vocab_size=experiment.model_config.vocab_size,
    pad_id=vocabulary.pad_id,
    eos_id=vocabulary.eos_id,
    prompted=experiment.prompted,
    constraints=answer_constraints(experiment),
    label_smoothing=loss.label_smoothing,
    drop_worst=loss.drop_worst,
    drop_worst_after=loss.drop_worst_after,
    average=loss.average,
  )


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
