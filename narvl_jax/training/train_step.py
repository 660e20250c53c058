"""The update: forward pass, loss, gradient, optimizer, moving averages."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from narvl_jax.state.parameters import (
  ParameterRule,
  Params,
  merge,
  split_frozen,
)
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.objective import Batch, Metrics, Objective
from narvl_jax.training.optimizer import ema_decay_at


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """Static settings of an update.

  Attributes:
    task_names: names by task index.
    objective: the loss.
    accumulation_steps: micro-batches in an update.
    ema_decay: decay of the moving averages, 0 for none.
    ema_warmup: see `ema_decay_at`.
  """

  task_names: tuple[str, ...]
  objective: Objective
  accumulation_steps: int = 1
  ema_decay: float = 0.0
  ema_warmup: bool = True


def batch_spec(
  batch_size: int,
  image_size: tuple[int, int],
  text_length: int,
  label_length: int,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and dtype of every array that an update reads."""
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {
    "image": ((*image_size, 3), np.uint8),
    "image_mask": ((), np.bool_),
    "text": ((text_length,), np.int32),
    "labels": ((label_length,), np.int32),
    "label_length": ((), np.int32),
    "confidence": ((), np.float32),
    "task": ((), np.int32),
    # False for rows that only fill the batch.
    "valid": ((), np.bool_),
  }
  return {
    name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    for name, (shape, dtype) in shapes.items()
  }


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  rules: Mapping[str, ParameterRule],
  config: StepConfig,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
  """Returns the function (state, batch, key) -> (new state, metrics).

  The key, with the step, seeds dropout. The batch has the arrays of
  `batch_spec`. With accumulation, its rows are
  split into micro-batches whose gradients are weighted by the number of labels
  or examples, so the update equals that of the whole batch. BatchNorm uses the
  statistics of each micro-batch and updates the running ones in sequence.

  An update whose loss or gradient is not finite changes only the step, on which
  learning rate, dropout and data depend.

  Metrics are float32 scalars: loss, nll, infeasible_fraction, examples,
  grad_norm (before clipping), learning_rate, skipped (1 if the update was not
  finite, otherwise 0), nll/TASK (NaN for a task without examples in the batch),
  and those of the objective.
  """

  def train_step(
    state: TrainState, batch: Batch, key: jax.Array
  ) -> tuple[TrainState, Metrics]:
    trained, frozen = split_frozen(state.params, rules)
    key = jax.random.fold_in(key, state.step)

    def loss_of(
      trained: Params, batch_stats: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Params, Metrics]]:
      variables = {
        "params": merge(trained, frozen),
        "batch_stats": batch_stats,
      }
      return _forward(model, config, variables, batch, key, state.step)

    gradient, batch_stats, metrics = _gradient(
      loss_of, config.accumulation_steps, trained, state.batch_stats, batch, key
    )
    with jax.named_scope("optimizer"):
      updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
    with jax.named_scope("metrics"):
      metrics["grad_norm"] = optax.tree.norm(gradient)
      metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["skipped"] = 1.0 - finite.astype(jnp.float32)

    with jax.named_scope("optimizer"):
      trained = _if(finite, optax.apply_updates(trained, updates), trained)
      batch_stats = _if(finite, batch_stats, state.batch_stats)
      opt_state = _if(finite, opt_state, state.opt_state)
    ema = state.ema
    if ema is not None:
      with jax.named_scope("ema"):
        decay = ema_decay_at(state.step, config.ema_decay, config.ema_warmup)
        averages = jax.tree.map(
          lambda old, new: old + (1.0 - decay) * (new - old),
          ema,
          {"params": trained, "batch_stats": batch_stats},
        )
        ema = _if(finite, averages, ema)
    new_state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=merge(trained, frozen),
      batch_stats=batch_stats,
      opt_state=opt_state,
      ema=ema,
    )
    return new_state, metrics

  return train_step


def _if(finite: jax.Array, new: Any, old: Any) -> Any:
  """Returns the new tree if `finite`, otherwise the old one."""

  def counts_steps(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)

  def choose(new: Any, old: Any) -> Any:
    # The schedule's counter must follow the step.
    return new if counts_steps(new) else jnp.where(finite, new, old)

  return jax.tree.map(choose, new, old, is_leaf=counts_steps)


def _forward(
  model: nn.Module,
  config: StepConfig,
  variables: Params,
  batch: Batch,
  key: jax.Array,
  step: jax.Array,
) -> tuple[jax.Array, tuple[Params, Metrics]]:
  """Returns the loss, the new running statistics and the metrics."""
  loss, metrics, batch_stats = config.objective(
    model, variables, batch, key, step
  )
  nll = metrics.pop("nll_per_example")
  with jax.named_scope("metrics"):
    _add_tasks(metrics, config.task_names, nll, batch)
  return loss, (batch_stats, metrics)


def _add_tasks(
  metrics: Metrics, names: Sequence[str], nll: jax.Array, batch: Batch
) -> None:
  """Adds the sum of the nll and the number of examples of every task."""
  for index, name in enumerate(names):
    here = (batch["task"] == index) & batch["valid"]
    metrics[f"sum/{name}"] = jnp.sum(jnp.where(here, nll, 0.0))
    metrics[f"count/{name}"] = jnp.sum(here.astype(jnp.float32))


def _gradient(
  loss_of: Callable[..., tuple[jax.Array, tuple[Params, Metrics]]],
  accumulation_steps: int,
  trained: Params,
  batch_stats: Params,
  batch: Batch,
  key: jax.Array,
) -> tuple[Params, Params, Metrics]:
  """Returns gradient, running statistics and metrics of the whole batch."""
  gradient_of = jax.grad(loss_of, has_aux=True)
  if accumulation_steps == 1:
    gradient, (batch_stats, metrics) = gradient_of(
      trained, batch_stats, batch, key
    )
    return gradient, batch_stats, _finish(metrics)

  # Row i goes to micro-batch i modulo steps, so devices keep their rows.
  micro_batches = jax.tree.map(
    lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1),
    dict(batch),
  )

  def accumulate(
    carry: tuple[Params, Params], inputs: tuple[Batch, jax.Array]
  ) -> tuple[tuple[Params, Params], Metrics]:
    total, batch_stats = carry
    micro_batch, index = inputs
    gradient, (batch_stats, metrics) = gradient_of(
      trained, batch_stats, micro_batch, jax.random.fold_in(key, index)
    )
    weight = metrics["weight"]
    total = jax.tree.map(lambda t, g: t + weight * g, total, gradient)
    return (total, batch_stats), metrics

  (total, batch_stats), stacked = jax.lax.scan(
    accumulate,
    (jax.tree.map(jnp.zeros_like, trained), batch_stats),
    (micro_batches, jnp.arange(accumulation_steps)),
  )
  weight = jnp.maximum(jnp.sum(stacked["weight"]), 1.0)
  gradient = jax.tree.map(lambda t: t / weight, total)
  metrics = {
    name: jnp.sum(value)
    if name == "examples" or "/" in name
    else jnp.sum(value * stacked["weight"]) / weight
    for name, value in stacked.items()
  }
  return gradient, batch_stats, _finish(metrics)


def _finish(metrics: Metrics) -> Metrics:
  """Replaces sums and counts per task by means."""
  metrics = {key: value for key, value in metrics.items() if key != "weight"}
  done = {name: value for name, value in metrics.items() if "/" not in name}
  for name, total in metrics.items():
    if name.startswith("sum/"):
      task = name.removeprefix("sum/")
      done[f"nll/{task}"] = total / metrics[f"count/{task}"]
  return done
