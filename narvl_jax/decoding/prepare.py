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

  Those of the decoder are split by layer. Once, for as a part of the program
  every call would copy them. The parallel decoder's stay as they are on
  several devices, where each has a part of them.
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
  """Returns whether a parallel decoder is faster split."""
  if not isinstance(model, NARVL) or not split_decoder.pays(model.config):
    return False
  return all(map(_one_device, jax.tree.leaves(variables)))


def _one_device(leaf: Any) -> bool:
  """Returns whether a leaf holds numbers, all on one device."""
  if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
    return len(leaf.sharding.device_set) == 1
  return False
