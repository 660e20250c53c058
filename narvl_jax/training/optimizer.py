"""AdamW and Muon with freezing, learning rates and decay from one rule list."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from narvl_jax.experiment.config_checks import check_schedule
from narvl_jax.state.parameters import ParameterRule, flatten
from narvl_jax.training.muon import muon


def make_schedule(
  *, learning_rate: Any, schedule: str, warmup_steps: int, steps: int
) -> optax.Schedule:
  """Builds the schedule: linear warm-up from 0, then decay to 0 or none.

  Args:
    learning_rate: peak, reached at `warmup_steps`; a number or a traced one.
    schedule: one of `config_table.KEYS["optimizer.schedule"].choices`.
    warmup_steps: length of the warm-up, counted in `steps`.
    steps: length of the run.

  Raises:
    UserError: unknown schedule, or a warm-up longer than the run.
  """
  check_schedule(schedule=schedule, warmup_steps=warmup_steps, steps=steps)
  rest = steps - warmup_steps
  if schedule == "linear":
    decay = optax.linear_schedule(learning_rate, 0.0, rest)
  elif schedule == "cosine":
    decay = optax.cosine_decay_schedule(learning_rate, rest)
  else:
    decay = optax.constant_schedule(learning_rate)
  if warmup_steps == 0:
    return decay
  warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
  schedule: optax.Schedule,
  rules: Mapping[str, ParameterRule],
  *,
  weight_decay: float,
  b1: float,
  b2: float,
  eps: float,
  clip_norm: float,
  eps_placement: str = "standard",
  matrices: Mapping[str, MuonDimensionNumbers] | None = None,
) -> optax.GradientTransformation:
  """Builds AdamW or Muon with global-norm clipping.

  Muon orthogonalises the momentum of matrices (Jordan 2024) and uses Adam for
  all other parameters. It needs fewer examples than AdamW to train a model from
  scratch.

  Args:
    schedule: step -> learning rate.
    rules: rule of every parameter. Pass only the trained parameters to the
      optimizer (see `split_frozen`): frozen ones then need no state and do not
      enter the norm.
    weight_decay: decoupled decay, multiplied by the learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    clip_norm: largest global norm of the gradient; 0 turns clipping off.
    eps_placement: "standard" (Kingma & Ba 2015, algorithm 1) corrects the
      bias of the second moment before adding eps, "official" (the variant at
      the end of their section 2; fairseq) after.
    matrices: axes of the parameters that Muon updates (`matrix_axes`); None
      for AdamW.
  """

  def apply_rules(updates: Any, params: Any) -> Any:
    flat_params = flatten(params or {})
    return flax.traverse_util.unflatten_dict(
      {
        path: _only_rows(
          rules[path].lr
          * (update + weight_decay * rules[path].decay * flat_params[path]),
          rules[path].rows,
        )
        for path, update in flatten(updates).items()
      },
      sep="/",
    )

  def cut_rows(updates: Any, params: Any) -> Any:
    del params
    flat = flatten(updates)
    cut = {path: _only_rows(x, rules[path].rows) for path, x in flat.items()}
    return flax.traverse_util.unflatten_dict(cut, sep="/")

  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  if any(rule.rows for rule in rules.values()):
    # Before the norm, which excludes rows that are not trained.
    clip = optax.chain(optax.stateless(cut_rows), clip)
  direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if eps_placement == "official":
    direction = _with_official_eps(direction, b1, b2, eps)
  if matrices is not None:
    direction = muon(matrices, eps=eps, b1=b1, b2=b2)
  return optax.chain(
    clip,
    direction,
    optax.stateless(apply_rules),
    optax.scale_by_learning_rate(schedule),
  )


def _with_official_eps(
  adam: optax.GradientTransformation, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
  """Adds epsilon before the bias correction; state and moments are Adam's."""

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    _, state = adam.update(updates, state, params)
    count = state.count.astype(jnp.float32)
    rate = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    return jax.tree.map(
      lambda mu, nu: rate * mu / (jnp.sqrt(nu) + eps), state.mu, state.nu
    ), state

  return optax.GradientTransformation(adam.init, update)


def _only_rows(value: jax.Array, rows: Sequence[int] | None) -> jax.Array:
  """Sets rows outside of [start, end) to zero; None keeps all."""
  if rows is None:
    return value
  index = jnp.arange(value.shape[0])
  kept = (index >= rows[0]) & (index < rows[1])
  return jnp.where(kept.reshape(-1, *[1] * (value.ndim - 1)), value, 0)


def matrix_axes(boxed: Any) -> dict[str, MuonDimensionNumbers]:
  """Finds the matrices among parameters by their logical axis names.

  Axes named "layers" or None stack matrices; all heads together are one axis.
  The last axis is the output. Embedding tables do not count as matrices. Muon
  treats a matrix as its transpose; the side that `fsdp` splits comes first.

  Args:
    boxed: nested parameters (shapes) with their axis names.

  Returns:
    path -> axes of both sides.
  """
  found = {}
  for path, names in flatten(nn.get_partition_spec(boxed)).items():
    named = [i for i, n in enumerate(names) if n not in (None, "layers")]
    heads = [i for i in named if names[i] in ("heads", "head_width")]
    output = heads if named[-1:] == heads[-1:] else named[-1:]
    inputs = [i for i in named if i not in output]
    if inputs and "vocab" not in names:
      sides = [tuple(inputs), tuple(output)]
      if names[output[-1]] in ("embed", "conv_out"):
        sides.reverse()
      found[path] = MuonDimensionNumbers(*sides)
  return found


def ema_decay_at(step: jax.Array, decay: float, warmup: bool) -> jax.Array:
  """Returns the decay of the moving average at an update.

  Args:
    step: int32 scalar, number of updates before this one.
    decay: final decay.
    warmup: use at most (1 + step) / (10 + step), so that a short run forgets
      its initial values; False uses `decay` from the first update on.
  """
  if not warmup:
    return jnp.float32(decay)
  step = step.astype(jnp.float32)
  return jnp.minimum(decay, (1.0 + step) / (10.0 + step))
