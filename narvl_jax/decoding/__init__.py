"""Decoding: from an encoded batch to token ids, on the device."""

from narvl_jax.decoding.autoregressive_reader import AutoregressiveReader
from narvl_jax.decoding.classes import Classes
from narvl_jax.decoding.greedy import greedy_decode
from narvl_jax.decoding.parallel_reader import ParallelReader
from narvl_jax.decoding.prepare import (
  cast_parameters,
  prepare_variables,
  prepared_shapes,
)
from narvl_jax.decoding.settings import Decoding
from narvl_jax.decoding.steps import Inputs, Steps, make_steps

__all__ = [
  "AutoregressiveReader",
  "Classes",
  "Decoding",
  "Inputs",
  "ParallelReader",
  "Steps",
  "cast_parameters",
  "greedy_decode",
  "make_steps",
  "prepare_variables",
  "prepared_shapes",
]
