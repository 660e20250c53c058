"""The split parallel decoder equals the scanned one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from narvl_jax.decoding import prepare_variables
from narvl_jax.models import make_model, model_config, split_decoder
from narvl_jax.models.encoder import EncoderOutput

CONFIG = model_config(
  "micro",
  width=32,
  mlp_width=48,
  num_heads=2,
  encoder_layers=1,
  decoder_layers=2,
  num_queries=5,
  vocab_size=60,
  image_encoder="conv",
)
MODEL = make_model(CONFIG)
BATCH, SOURCE = 3, 7


def _variables() -> dict:
  """Weights so large that every bias and both attentions count."""
  image, text = jnp.zeros((1, 32, 32, 3)), jnp.ones((1, 4), jnp.int32)
  shapes = meta.unbox(
    jax.eval_shape(lambda: MODEL.init(jax.random.key(0), image, text))
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype),
    shapes,
  )


def _encoded() -> EncoderOutput:
  rng = np.random.default_rng(1)
  mask = np.ones((BATCH, SOURCE), bool)
  mask[1, 4:] = False
  return EncoderOutput(
    out=jnp.asarray(rng.standard_normal((BATCH, SOURCE, 32)), jnp.float32),
    mask=jnp.asarray(mask),
    positions=jnp.asarray(rng.standard_normal((SOURCE, 32)), jnp.float32),
    image_features=jnp.zeros((BATCH, 1, 1, 1)),
  )


def test_states_are_those_of_the_scanned_decoder() -> None:
  variables, encoded = _variables(), _encoded()
  expected: Any = MODEL.apply(variables, encoded, method="decode")
  decoder = prepare_variables(MODEL, variables)["params"]["decoder"]
  assert isinstance(decoder["layers"], tuple)
  found = split_decoder.decode(CONFIG, decoder, encoded)
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
  # Masked tokens have no effect; other tokens have one.
  other = encoded._replace(out=encoded.out.at[1, 4:].add(1.0))
  np.testing.assert_array_equal(
    split_decoder.decode(CONFIG, decoder, other)[1], found[1]
  )
  other = encoded._replace(out=encoded.out.at[1, 3].add(1.0))
  changed = split_decoder.decode(CONFIG, decoder, other)[1]
  assert np.abs(changed - found[1]).max() > 1e-3


def test_many_queries_and_shapes_without_numbers_stay_as_they_are() -> None:
  many = make_model(dataclasses.replace(CONFIG, num_queries=16))
  variables = _variables()
  assert prepare_variables(many, variables) is variables
  abstract = jax.eval_shape(lambda: variables)
  assert prepare_variables(MODEL, abstract) is abstract
