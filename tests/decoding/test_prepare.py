"""Weights are cast and split once, before the programs run."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding import (
  AutoregressiveReader,
  Classes,
  Decoding,
  ParallelReader,
  Steps,
  make_steps,
  prepare_variables,
  prepared_shapes,
)
from narvl_jax.models import make_model
from tests.models import small

HALF = dataclasses.replace(small.CONFIG, dtype=jnp.bfloat16)
CLASSES = Classes.of(small.V, pad_id=1, eos_id=2, blank_id=small.V - 1)
BATCH = {
  "image": np.asarray(127.5 * (1 + small.image()), np.uint8),
  "text": small.text(),
  "image_mask": np.ones(small.B, bool),
  "merge_repeats": np.ones(small.B, bool),
  "lengths": np.array([0, 3], np.int32),
}
# A float32 argument of a program that is cast.
_CAST = re.compile(r"stablehlo.convert %arg\d+ : \(tensor<[\dx]*xf32>\)")


def lower(steps: Steps, variables: Any) -> Any:
  return steps.predict.lower(variables, **BATCH)


@pytest.mark.parametrize("decoder", ["parallel", "autoregressive"])
def test_programs_cast_no_weights(decoder: str) -> None:
  config = dataclasses.replace(HALF, decoder=decoder)
  wide_model = make_model(dataclasses.replace(config, dtype=jnp.float32))
  model = make_model(config)
  variables = jax.device_put(small.variables(config))
  reader = ParallelReader(CLASSES)
  if decoder == "autoregressive":
    reader = AutoregressiveReader(CLASSES, Decoding(), 3)
  steps = make_steps(model, reader)
  prepared = prepare_variables(model, variables)
  split_only = prepare_variables(wide_model, variables)
  programs = [lower(steps, tree) for tree in (split_only, prepared)]
  casts = [len(_CAST.findall(program.as_text())) for program in programs]
  assert casts[0] > 20
  # Statistics of BatchNorm and affine maps of LayerNorm stay float32.
  assert casts[1] == 0
  # Otherwise the compiler may leave out roundings in one of the programs.
  exact = {"xla_allow_excess_precision": False}
  found, expected = (
    program.compile(compiler_options=exact)(tree, **BATCH)
    for program, tree in zip(programs, (split_only, prepared), strict=True)
  )
  np.testing.assert_array_equal(found["ids"], expected["ids"])
  np.testing.assert_allclose(
    found["log_probs"], expected["log_probs"], rtol=0.02
  )


def test_normalisations_stay_float32() -> None:
  model = make_model(HALF)
  variables = jax.device_put(small.variables(HALF))
  prepared = prepare_variables(model, variables)
  wide = {
    jax.tree_util.keystr(path[-2:])
    for path, leaf in jax.tree.leaves_with_path(prepared["params"])
    if leaf.dtype == jnp.float32
  }
  assert {"['layer_norm']['scale']", "['layer_norm']['bias']"} <= wide
  assert all(
    re.search(r"(norm\d?|_ln|layernorm_embedding)'\]", n) for n in wide
  )
  shapes = jax.eval_shape(lambda: variables)
  assert prepared_shapes(model, shapes) == jax.eval_shape(lambda: prepared)
  assert prepare_variables(make_model(small.CONFIG), shapes) is shapes
