"""Variables in the form that the readers take."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from narvl_jax.models import (
  NARVL,
  Autoregressive,
  cached_decoder,
  split_decoder,
)
from narvl_jax.models.sizes import ModelConfig


def prepare_variables(model: nn.Module, variables: Any) -> Any:
  """Returns the variables in the form that the reader of a model takes.

  The parameters are cast by `cast_parameters`. The decoder's are split by
  layer, once: inside a jitted program, every call would copy them. Those of a
  parallel decoder that are sharded over several devices stay stacked.
  """
  return _prepare(model, variables, _all_on_one_device(variables))


def prepared_shapes(model: nn.Module, shapes: Any) -> Any:
  """Returns the shapes that `prepare_variables` would return on one device."""
  return jax.eval_shape(lambda tree: _prepare(model, tree, True), shapes)


def cast_parameters(config: ModelConfig, variables: Any) -> Any:
  """Returns the variables with parameters of the compute type of a model.

  The modules cast them before use, so the answers stay the same; without this,
  every call of a program would read and cast the float32 ones. Scales and
  biases of normalisations stay float32, the type in which they are applied.

  Args:
    config: the architecture.
    variables: unboxed arrays, tracers or `jax.ShapeDtypeStruct`s.
  """
  dtype = jnp.dtype(config.dtype)
  if dtype == jnp.float32:
    return variables

  def cast(leaf: Any) -> Any:
    if _is_normalisation(leaf):
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf.update(dtype=dtype)
    return jnp.asarray(leaf, dtype)

  params = jax.tree.map(cast, variables["params"], is_leaf=_is_normalisation)
  return {**variables, "params": params}


def _is_normalisation(tree: Any) -> bool:
  return isinstance(tree, Mapping) and "scale" in tree


def _prepare(model: nn.Module, variables: Any, one_device: bool) -> Any:
  if not isinstance(model, NARVL | Autoregressive):
    return variables
  config = model.config
  variables = cast_parameters(config, variables)
  params = variables["params"]
  if isinstance(model, Autoregressive):
    depth = config.decoder_layers
    decoder = cached_decoder.split_layers(params["decoder"], depth)
  elif one_device and split_decoder.pays(config):
    decoder = split_decoder.split_parameters(config, params["decoder"])
  else:
    return variables
  return {**variables, "params": {**params, "decoder": decoder}}


def _all_on_one_device(variables: Any) -> bool:
  """Returns whether every leaf is an array on one device, not a tracer."""
  return all(map(_on_one_device, jax.tree.leaves(variables)))


def _on_one_device(leaf: Any) -> bool:
  if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
    return len(leaf.sharding.device_set) == 1
  return False
