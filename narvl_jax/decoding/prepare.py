"""Variables in the form that the readers take."""

from typing import Any

import flax.linen as nn
import jax
from jax.core import Tracer

from narvl_jax.decoding import autoregressive_reader
from narvl_jax.models import NARVL, split_decoder


def prepare_variables(model: nn.Module, variables: Any) -> Any:
  """Returns the variables in the form that the reader of a model takes.

  Those of the decoder are split by layer. Once, for as a part of the program
  every call would copy them. The parallel decoder's stay as they are on
  several devices, where each has a part of them.
  """
  if not isinstance(model, NARVL):
    return autoregressive_reader.prepare_variables(model, variables)
  leaves = jax.tree.leaves(variables)
  if not split_decoder.pays(model.config) or not all(map(_one_device, leaves)):
    return variables
  params = variables["params"]
  decoder = split_decoder.split_parameters(model.config, params["decoder"])
  return {**variables, "params": {**params, "decoder": decoder}}


def _one_device(leaf: Any) -> bool:
  """Returns whether a leaf holds numbers, all on one device."""
  if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
    return len(leaf.sharding.device_set) == 1
  return False
