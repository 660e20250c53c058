"""Variables in the form that the readers take."""

from typing import Any

import flax.linen as nn
import jax
from jax.core import Tracer

from narvl_jax.models import (
  NARVL,
  Autoregressive,
  cached_decoder,
  split_decoder,
)


def prepare_variables(model: nn.Module, variables: Any) -> Any:
  """Returns the variables in the form that the reader of a model takes.

  The decoder's are split by layer, once: inside a jitted program, every call
  would copy them. Those of a parallel decoder that are sharded over several
  devices stay stacked.
  """
  params = variables["params"]
  if isinstance(model, Autoregressive):
    depth = model.config.decoder_layers
    decoder = cached_decoder.split_layers(params["decoder"], depth)
  elif _splits(model, variables):
    decoder = split_decoder.split_parameters(model.config, params["decoder"])
  else:
    return variables
  return {**variables, "params": {**params, "decoder": decoder}}


def _splits(model: nn.Module, variables: Any) -> bool:
  """Returns whether a parallel decoder is faster with split parameters."""
  if not isinstance(model, NARVL) or not split_decoder.pays(model.config):
    return False
  return all(map(_one_device, jax.tree.leaves(variables)))


def _one_device(leaf: Any) -> bool:
  """Returns whether a leaf is an array on one device, not a tracer."""
  if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
    return len(leaf.sharding.device_set) == 1
  return False
