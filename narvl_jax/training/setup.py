"""Everything about a run that is known before an array exists."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import optax
from flax.linen import meta
from jax.sharding import Mesh

from narvl_jax.data.example import TASKS
from narvl_jax.experiment import Experiment
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
from narvl_jax.training.flops import train_flops
from narvl_jax.training.objective import AutoregressiveLoss, QueryCtcLoss
from narvl_jax.training.optimizer import (
  ParameterRule,
  assign_rules,
  flatten,
  make_optimizer,
  make_schedule,
  matrix_axes,
)
from narvl_jax.training.train_state import (
  TrainState,
  bytes_per_device,
  make_init,
  state_shardings,
)
from narvl_jax.training.train_step import (
  Batch,
  Metrics,
  StepConfig,
  batch_spec,
  make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Setup:
  """Shapes, shardings and functions of a run.

  Attributes:
    experiment: what is trained.
    mesh: where.
    rules: rule of every parameter.
    schedule: step -> learning rate.
    abstract_state: shapes of the state.
    shardings: shardings of the state.
    batch: shapes of a batch.
    init: jitted, key -> state.
    step: jitted, (state, batch) -> (state, metrics); the state is donated.
  """

  experiment: Experiment
  mesh: Mesh
  rules: dict[str, ParameterRule]
  schedule: optax.Schedule
  abstract_state: TrainState
  shardings: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  init: Any
  step: Any

  def compile_step(self) -> jax.stages.Compiled:
    """Compiles the update for the one shape that batches have."""
    with jax.set_mesh(self.mesh):
      return self.step.lower(self.abstract_state, self.batch).compile()

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
    return train_flops(
      self.experiment.model_config,
      tuple(data.image_size),
      data.max_text_length,
      self.experiment.config.train.batch_size,
      self.experiment.answer_positions,
    )

  def sharding_table(self) -> str:
    """Returns where every parameter lies, and the bytes on one device."""
    mesh_shape, rules = self.mesh.shape, self.experiment.config.mesh.rules
    boxed = self.experiment.abstract_variables()
    table = sharding_table(place(boxed, mesh_shape, rules), mesh_shape, rules)
    state = f"{self.state_bytes_per_device:,}"
    return f"{table}\nwhole training state: {state} bytes a device"

  def parameter_table(self) -> str:
    """Returns a line per parameter: name, shape, count, how it is trained."""
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
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
      f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}"
      f"  {row[3]:>{widths[3]}}  {row[4]:>{widths[4]}}"
      for row in rows
    )


def build_setup(experiment: Experiment, mesh: Mesh) -> Setup:
  """Derives shapes, shardings and functions from the config.

  Raises:
    UserError: the batch does not divide, or a rule of the optimizer is wrong.
  """
  config = experiment.config
  data, train, optim = config.data, config.train, config.optimizer
  check_batch_size(
    train.batch_size, mesh, accumulation_steps=train.accumulation_steps
  )
  image_size = tuple(data.image_size)
  boxed = experiment.abstract_variables()
  paths = list(flatten(meta.unbox(boxed)["params"]))
  rules = assign_rules(optim.rules, paths)
  schedule = make_schedule(
    learning_rate=optim.learning_rate,
    schedule=optim.schedule,
    warmup_steps=optim.warmup_steps,
    steps=train.steps,
  )
  optimizer = make_optimizer(
    schedule,
    rules,
    weight_decay=optim.weight_decay,
    b1=optim.b1,
    b2=optim.b2,
    eps=optim.eps,
    clip_norm=optim.clip_norm,
    matrices=matrix_axes(boxed["params"]) if optim.name == "muon" else None,
  )
  init = make_init(
    experiment.model,
    optimizer,
    rules,
    image_size=image_size,
    text_length=data.max_text_length,
    ema=optim.ema_decay > 0,
  )
  abstract_state = jax.eval_shape(
    init, jax.eval_shape(lambda: jax.random.key(0))
  )
  shardings = state_shardings(abstract_state, boxed, mesh, config.mesh.rules)
  step = make_train_step(
    experiment.model, optimizer, schedule, rules, step_config(experiment)
  )

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    # What the modules say of their activations has a meaning from here on.
    with nn.logical_axis_rules(activation_rules(config.mesh.rules)):
      return step(state, batch)

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
    step=jax.jit(
      train_step,
      donate_argnums=0,
      in_shardings=(shardings, batch_sharding(mesh)),
      out_shardings=(shardings, replicated(mesh)),
      compiler_options=_step_options(mesh),
    ),
  )


def _step_options(mesh: Mesh) -> dict[str, Any] | None:
  """Returns compiler options of the update.

  On TPUs the compiler else splits products with sharded weights into loops
  that pass parts of a weight, or of the batch, from chip to chip. Their many
  steps take long to compile, and gradients are no longer summed and scattered
  in one go.
  """
  if mesh.devices.flat[0].platform == "tpu":
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
  return None


def _init_options() -> dict[str, Any] | None:
  """Returns compiler options for a program that runs once.

  On a CPU the optimizer of the compiler takes many times longer over the
  random numbers than it could ever save.
  """
  if jax.default_backend() == "cpu":
    return {"xla_backend_optimization_level": 0}
  return None


def step_config(experiment: Experiment) -> StepConfig:
  """Returns the settings of an update that a config asks for."""
  config = experiment.config
  return StepConfig(
    seed=config.seed,
    task_names=TASKS,
    objective=_objective(experiment),
    accumulation_steps=config.train.accumulation_steps,
    ema_decay=config.optimizer.ema_decay,
    ema_warmup=config.optimizer.ema_warmup,
  )


def _objective(experiment: Experiment) -> QueryCtcLoss | AutoregressiveLoss:
  """Returns the loss of the model that is trained."""
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
    label_smoothing=loss.label_smoothing,
    drop_worst=loss.drop_worst,
    drop_worst_after=loss.drop_worst_after,
  )


def describe_parallelism(setup: Setup) -> str:
  """Returns how a batch is split, such as `batch 128 = 8 devices x 16`."""
  parts = data_parallel_size(setup.mesh)
  steps = setup.experiment.config.train.accumulation_steps
  size = setup.experiment.config.train.batch_size
  text = f"batch {size} = {parts} x {size // parts // steps}"
  return text + (f" x {steps} accumulation steps" if steps > 1 else "")
