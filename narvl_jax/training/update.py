"""The update of a config: its optimizer, its objective and their inputs."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax

from narvl_jax.data.example import TASKS
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.parallel import (
  BATCH_AXES,
  VOCAB_AXIS,
  WIDTH_AXIS,
  activation_rules,
)
from narvl_jax.query_ctc import MeshAxes
from narvl_jax.state.parameters import ParameterRule
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.constrained import answer_constraints
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
from narvl_jax.training.run_inputs import RunInputs
from narvl_jax.training.teacher import Teacher
from narvl_jax.training.train_step import (
  Batch,
  Metrics,
  StepConfig,
  make_train_step,
)

# Arguments of `make_optimizer` that are keys of the config.
_OF_OPTIMIZER = "weight_decay", "b1", "b2", "eps", "eps_placement", "clip_norm"


def optimizer_of(
  config: Any, learning_rate: Any, boxed: Any, rules: dict[str, ParameterRule]
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Returns schedule and optimizer of a config for boxed parameters."""
  optim = config.optimizer
  schedule = make_schedule(
    learning_rate=learning_rate,
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


def make_update(
  experiment: Experiment,
  teacher: Teacher | None,
  optimizer_at: Callable[
    [jax.Array], tuple[optax.Schedule, optax.GradientTransformation]
  ],
  rules: dict[str, ParameterRule],
) -> Callable[[RunInputs, TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns the update of a config, see `Setup.program`."""
  config = experiment.config
  of_labels = make_objective(experiment)

  def objective_of(inputs: RunInputs) -> Objective:
    if teacher is None:
      return of_labels
    assert isinstance(of_labels, QueryCtcLoss)
    return DistillationLoss(
      of_labels,
      teacher,
      inputs.teacher,
      weight=config.distillation.weight,
      temperature=config.distillation.temperature,
    )

  def train_step(
    inputs: RunInputs, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    settings = StepConfig(
      task_names=TASKS,
      objective=objective_of(inputs),
      accumulation_steps=config.train.accumulation_steps,
      ema_decay=config.optimizer.ema_decay,
      ema_warmup=config.optimizer.ema_warmup,
    )
    schedule, optimizer = optimizer_at(inputs.learning_rate)
    update = make_train_step(
      experiment.model, optimizer, schedule, rules, settings
    )
    # Gives the modules' logical axes of activations a meaning.
    with nn.logical_axis_rules(activation_rules(config.mesh.rules)):
      return update(state, batch, jax.random.wrap_key_data(inputs.seed))

  return train_step


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
