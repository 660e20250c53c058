"""The state of a run, and its sharding."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.linen import meta
from jax.sharding import Mesh

from narvl_jax.models.shapes import initializer
from narvl_jax.parallel import DEFAULT_RULES, replicated, tree_shardings
from narvl_jax.state.parameters import (
  ParameterRule,
  Params,
  flatten,
  merge,
  split_frozen,
)


@flax.struct.dataclass
class TrainState:
  """State of a run after `step` updates.

  Attributes:
    step: int32 scalar.
    params: nested float32 parameters.
    batch_stats: running statistics of BatchNorm, empty if there are none.
    opt_state: state of the optimizer for the trained parameters.
    ema: moving averages {"params": trained parameters, "batch_stats"}, or
      None.
  """

  step: jax.Array
  params: Params
  batch_stats: Params
  opt_state: Any
  ema: Params | None


def make_first_state(
  optimizer: optax.GradientTransformation,
  rules: Mapping[str, ParameterRule],
  *,
  ema: bool,
) -> Callable[[Any], TrainState]:
  """Returns a function unboxed variables -> state before the first update."""

  def first_state(variables: Any) -> TrainState:
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    trained, _ = split_frozen(params, rules)
    averages = {"params": trained, "batch_stats": batch_stats}
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=batch_stats,
      opt_state=optimizer.init(trained),
      # Copies: two leaves in one buffer could not both be donated.
      ema=jax.tree.map(jnp.copy, averages) if ema else None,
    )

  return first_state


def make_init(
  model: nn.Module,
  first_state: Callable[[Any], TrainState],
  *,
  image_size: tuple[int, int],
  text_length: int,
) -> Callable[[jax.Array], TrainState]:
  """Returns a function key -> state before the first update."""
  initialize = initializer(model, image_size, text_length)
  return lambda key: first_state(meta.unbox(initialize(key)))


def evaluation_variables(state: TrainState) -> dict[str, Any]:
  """Returns the variables to evaluate: moving averages if there are any."""
  if state.ema is None:
    return {"params": state.params, "batch_stats": state.batch_stats}
  return averaged_variables(state.params, state.ema)


def averaged_variables(params: Params, ema: Params) -> dict[str, Any]:
  """Returns the moving averages, and the frozen parameters without any."""
  return {
    "params": merge(params, ema["params"]),
    "batch_stats": ema["batch_stats"],
  }


def state_shardings(
  abstract: TrainState,
  boxed: Any,
  mesh: Mesh,
  rules: Iterable[Any] = DEFAULT_RULES,
) -> TrainState:
  """Returns the sharding of every leaf of the state.

  Args:
    abstract: shapes of the state.
    boxed: shapes of the variables with their logical axis names.
    mesh: the device mesh.
    rules: sharding rules of the logical axes.

  Returns:
    A `TrainState` of `NamedSharding`s: moments and averages have the sharding
    of their parameter, everything else is replicated.
  """
  shardings = tree_shardings(boxed, mesh, rules)
  of_path = flatten(shardings["params"])

  def like_parameter(path: tuple[Any, ...], leaf: Any) -> Any:
    names = [str(getattr(key, "key", "")) for key in path]
    # The path of a moment is FIELD.../PATH_OF_THE_PARAMETER.
    for start in range(len(names)):
      sharding = of_path.get("/".join(names[start:]))
      if sharding is not None and leaf.ndim:
        return sharding
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(like_parameter, abstract)


def bytes_per_device(abstract: Any, shardings: Any) -> int:
  """Returns the bytes that one device holds of a tree of arrays."""

  def size(leaf: Any, sharding: jax.sharding.Sharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(size, abstract, shardings)))
