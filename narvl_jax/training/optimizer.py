"""AdamW whose freezing, learning rates and decay come from one rule list."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from optax import contrib
from optax.contrib import MuonDimensionNumbers

from narvl_jax.errors import UserError, did_you_mean

SCHEDULES = ("linear", "cosine", "constant")
# Muon's updates times this have the size of AdamW's (arXiv 2502.16982).
_MUON_RMS = 0.2

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ParameterRule:
  """How one parameter is trained.

  Attributes:
    lr: factor on the learning rate.
    decay: factor on the weight decay.
    freeze: no gradient, no optimizer state, no change.
    rows: (first, last + 1); only these rows of a table change; None: all.
  """

  lr: float = 1.0
  decay: float = 1.0
  freeze: bool = False
  rows: tuple[int, int] | None = None


def queries_only(blank_id: int) -> tuple[tuple[str, dict[str, Any]], ...]:
  """Returns `optimizer.rules` that train what is new in weights of OFA.

  That is the queries and the row of the blank; all else stays as it is.

  Args:
    blank_id: 59457 with the official vocabulary.
  """
  return (
    ("embed_tokens", {"rows": (blank_id, blank_id + 1)}),
    ("decoder/query_embed", {}),
    (".*", {"freeze": True}),
  )


def parse_rules(rules: Iterable[Any]) -> list[tuple[str, ParameterRule]]:
  """Reads `optimizer.rules`, a list of (regex, {lr, decay, freeze}).

  Raises:
    UserError: an entry is not such a pair, a regex that does not compile, an
      unknown setting or a value of the wrong type.
  """
  names = [field.name for field in dataclasses.fields(ParameterRule)]
  parsed = []
  for entry in rules:
    if (
      not isinstance(entry, Sequence)
      or len(entry) != 2
      or not isinstance(entry[0], str)
      or not isinstance(entry[1], Mapping)
    ):
      raise UserError(
        f"optimizer.rules: {entry!r} is not a pair (regex, settings) such as"
        ' (".*/bias", {"decay": 0.0})'
      )
    pattern, settings = entry
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(
        f'optimizer.rules: regex "{pattern}" does not compile: {error}'
      ) from error
    for name, value in settings.items():
      if name not in names:
        raise UserError(
          f'optimizer.rules: "{pattern}" sets "{name}".'
          f"{did_you_mean(name, names)}"
        )
      if name == "rows":
        if not _is_range(value):
          raise UserError(
            f'optimizer.rules: "{pattern}" sets rows={value!r}, not (first,'
            " last + 1) such as (59457, 59458)"
          )
        continue
      number = isinstance(value, (bool, int, float)) and value >= 0
      if not number or (name == "freeze" and not isinstance(value, bool)):
        kind = "True or False" if name == "freeze" else "a number >= 0"
        raise UserError(
          f'optimizer.rules: "{pattern}" sets {name}={value!r}, not {kind}'
        )
    parsed.append((pattern, ParameterRule(**settings)))
  return parsed


def _is_range(value: Any) -> bool:
  """Returns whether a value is (first, last + 1) of some rows."""
  if not isinstance(value, (tuple, list)) or len(value) != 2:
    return False
  whole = all(isinstance(x, int) and x >= 0 for x in value)
  return whole and value[0] < value[1]


def assign_rules(
  rules: Iterable[Any], paths: Sequence[str]
) -> dict[str, ParameterRule]:
  """Gives each parameter the first rule whose regex matches its full path.

  Args:
    rules: (regex, settings) pairs in order of priority.
    paths: parameter names such as `encoder/layers/mlp/kernel`.

  Returns:
    The rule of every path.

  Raises:
    UserError: a parameter without a rule, or a rule that no parameter uses.
  """
  parsed = parse_rules(rules)
  assigned: dict[str, ParameterRule] = {}
  used: set[str] = set()
  for path in paths:
    for pattern, rule in parsed:
      if re.fullmatch(pattern, path):
        assigned[path] = rule
        used.add(pattern)
        break
    else:
      raise UserError(
        f'optimizer.rules: no rule for parameter "{path}"; end the list with'
        ' a default, (".*", {})'
      )
  for pattern, _ in parsed:
    if pattern not in used:
      shadowed = any(re.fullmatch(pattern, path) for path in paths)
      why = (
        "earlier rules take all its parameters"
        if shadowed
        else "it matches no parameter." + did_you_mean(pattern, paths)
      )
      raise UserError(f'optimizer.rules: "{pattern}" is never used: {why}')
  return assigned


def flatten(params: Params) -> dict[str, Any]:
  """Returns nested parameters as {path: leaf}, path joined by slashes."""
  return flax.traverse_util.flatten_dict(dict(params), sep="/")


def split_frozen(
  params: Params, rules: Mapping[str, ParameterRule]
) -> tuple[Params, Params]:
  """Splits nested parameters into the trained and the frozen ones."""
  trained, frozen = {}, {}
  for path, leaf in flatten(params).items():
    (frozen if rules[path].freeze else trained)[path] = leaf
  unflatten = flax.traverse_util.unflatten_dict
  return unflatten(trained, sep="/"), unflatten(frozen, sep="/")


def merge(trained: Params, frozen: Params) -> Params:
  """Puts together what `split_frozen` took apart."""
  return flax.traverse_util.unflatten_dict(
    {**flatten(trained), **flatten(frozen)}, sep="/"
  )


def make_schedule(
  *, learning_rate: float, schedule: str, warmup_steps: int, steps: int
) -> optax.Schedule:
  """Builds the schedule: linear warm-up from 0, then decay to 0 or none.

  Args:
    learning_rate: peak, reached at `warmup_steps`.
    schedule: one of `SCHEDULES`.
    warmup_steps: length of the warm-up, counted in `steps`.
    steps: length of the run; the linear schedule is the reference's.

  Raises:
    UserError: unknown schedule, or a warm-up longer than the run.
  """
  if schedule not in SCHEDULES:
    raise UserError(
      f'optimizer.schedule="{schedule}" is unknown.'
      f"{did_you_mean(schedule, SCHEDULES)} (--config.optimizer.schedule)"
    )
  if not 0 <= warmup_steps < steps:
    raise UserError(
      f"optimizer.warmup_steps={warmup_steps} must be at least 0 and below"
      f" train.steps={steps}: --config.optimizer.warmup_steps={steps // 10}"
    )
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
  matrices: Mapping[str, MuonDimensionNumbers] | None = None,
) -> optax.GradientTransformation:
  """Builds AdamW or Muon with global-norm clipping.

  Muon orthogonalises the momentum of a matrix (Jordan 2024); parameters that
  are no matrices are left to Adam. It needs fewer examples than AdamW where a
  model is trained from scratch.

  Args:
    schedule: step -> learning rate.
    rules: rule of every parameter; the optimizer is to be given the trained
      ones only (see `split_frozen`), so frozen ones cost no state and do not
      enter the norm.
    weight_decay: decoupled decay, multiplied by the learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    clip_norm: largest global norm of the gradient; 0 turns clipping off.
    matrices: the axes of those parameters that Muon takes (`matrix_axes`);
      None for AdamW.
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
    # Before the norm, in which rows that stay have no part.
    clip = optax.chain(optax.stateless(cut_rows), clip)
  direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if matrices is not None:

    def axes_of(params: Any) -> Any:
      axes = {path: matrices.get(path) for path in flatten(params)}
      return flax.traverse_util.unflatten_dict(axes, sep="/")

    # It scales by minus the learning rate, which comes last here.
    direction = contrib.muon(
      -1.0,
      eps=eps,
      adam_b1=b1,
      adam_b2=b2,
      consistent_rms=_MUON_RMS,
      muon_weight_dimension_numbers=axes_of,
    )
  return optax.chain(
    clip,
    direction,
    optax.stateless(apply_rules),
    optax.scale_by_learning_rate(schedule),
  )


def _only_rows(value: jax.Array, rows: Sequence[int] | None) -> jax.Array:
  """Sets all rows but some to zero; None keeps them."""
  if rows is None:
    return value
  index = jnp.arange(value.shape[0])
  kept = (index >= rows[0]) & (index < rows[1])
  return jnp.where(kept.reshape(-1, *[1] * (value.ndim - 1)), value, 0)


def matrix_axes(boxed: Any) -> dict[str, MuonDimensionNumbers]:
  """Finds the matrices among parameters by their logical axis names.

  Axes named "layers" or None only stack matrices; all heads together are one
  axis. The last axis is the output. Tables, which are looked up by their
  rows, are no matrices.

  Args:
    boxed: nested parameters (shapes) with their axis names.

  Returns:
    path -> input and output axes.
  """
  found = {}
  for path, names in flatten(nn.get_partition_spec(boxed)).items():
    named = [i for i, n in enumerate(names) if n not in (None, "layers")]
    heads = [i for i in named if names[i] in ("heads", "head_width")]
    output = heads if named[-1:] == heads[-1:] else named[-1:]
    inputs = [i for i in named if i not in output]
    if inputs and "vocab" not in names:
      found[path] = MuonDimensionNumbers(tuple(inputs), tuple(output))
  return found


def ema_decay_at(step: jax.Array, decay: float, warmup: bool) -> jax.Array:
  """Returns the decay of the moving average at an update.

  Args:
    step: int32 scalar, number of updates before this one.
    decay: final decay.
    warmup: start low, (1 + step) / (10 + step), so that a short run forgets
      its random start; False keeps `decay` from the first update on.
  """
  if not warmup:
    return jnp.float32(decay)
  step = step.astype(jnp.float32)
  return jnp.minimum(decay, (1.0 + step) / (10.0 + step))
