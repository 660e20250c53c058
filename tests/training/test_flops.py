"""The formula against counts of what is traced and what is compiled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from narvl_jax.experiment.create import create
from narvl_jax.models import (
  NARVL,
  Autoregressive,
  ModelConfig,
  model_config,
)
from narvl_jax.models.positions import num_image_buckets
from narvl_jax.models.transformer import DecoderLayer, EncoderLayer
from narvl_jax.parallel import make_mesh
from narvl_jax.training import flops
from narvl_jax.training.setup import build_setup
from tests.support.count_products import matmul_flops
from tests.support.tiny import tiny_config

_TINY = model_config(
  "micro",
  vocab_size=253,
  num_queries=5,
  max_text_positions=64,
  encoder_layers=3,
)
_BASE = model_config("base")


def _spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
  ("config", "image_size"),
  [
    (_TINY, (64, 96)),
    # Sides that do not divide.
    (_TINY, (50, 34)),
    (
      model_config("micro", image_encoder="conv", patch_size=8, vocab_size=90),
      (32, 48),
    ),
    (_BASE, (480, 480)),
    (model_config("huge"), (480, 480)),
  ],
)
def test_forward_pass(config: ModelConfig, image_size: tuple[int, int]):
  rows, length = 3, 24
  model = NARVL(config)
  image = _spec(rows, *image_size, 3)
  text = _spec(rows, length, dtype=jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image, text)
  # The padding of the table is cut off outside of training.
  padding = config.padded_vocab_size - config.vocab_size
  cut = 2 * rows * config.num_queries * config.width * padding
  counted = matmul_flops(model.apply, variables, image, text)
  formula = flops.forward_flops(config, image_size, length, rows)
  assert formula == counted + cut


def test_forward_pass_of_the_autoregressive_twin():
  config = dataclasses.replace(_TINY, decoder="autoregressive")
  rows, length, answer = 2, 10, 9
  model = Autoregressive(config)
  image, text = _spec(rows, 64, 96, 3), _spec(rows, length, dtype=jnp.int32)
  tokens = _spec(rows, answer, dtype=jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image, text)
  padding = config.padded_vocab_size - config.vocab_size
  cut = 2 * rows * answer * config.width * padding
  counted = matmul_flops(model.apply, variables, image, text, tokens)
  formula = flops.forward_flops(
    config, (64, 96), length, rows, (answer, answer)
  )
  assert formula == counted + cut


def _layer(
  config: ModelConfig, kind: str, grid: tuple[int, int], text: int
) -> Any:
  """Returns a layer's `apply`, and the shapes of parameters and input."""
  source = grid[0] * grid[1] + text
  n, h = config.num_queries, config.num_heads
  per_layer = {"drop_path": _spec(), "token_table": _spec(511, h)}
  shared: dict[str, Any]
  if kind == "encoder":
    layer, rows = EncoderLayer(config, False, grid), source
    buckets = num_image_buckets(config.image_bucket_size)
    per_layer["image_table"] = _spec(buckets, h)
    shared = {
      "position_bias": _spec(1, h, source, source),
      "key_mask": _spec(2, source, dtype=bool),
    }
  else:
    layer, rows = DecoderLayer(config, False), n
    shared = {
      "self_bias": _spec(1, h, n, n),
      "cross_bias": _spec(1, h, n, source),
      "memory": _spec(2, source, config.width),
      "memory_mask": _spec(2, source, dtype=bool),
      "self_mask": None,
    }
  args = (_spec(2, rows, config.width), per_layer, shared)
  params = jax.eval_shape(layer.init, jax.random.key(0), *args)
  return layer.apply, (params, *args)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize(
  ("config", "grid", "text", "tolerance"),
  [
    # What is not a product weighs more in a narrow layer.
    (_TINY, (4, 6), 10, 0.25),
    # So short that all heads attend at once: loops are counted once.
    (_BASE, (10, 10), 40, 0.03),
  ],
)
def test_one_layer_as_the_compiler_counts(
  kind: str,
  config: ModelConfig,
  grid: tuple[int, int],
  text: int,
  tolerance: float,
):
  function, args = _layer(config, kind, grid, text)
  compiled = jax.jit(function).lower(*args).compile()
  analysis: Any = compiled.cost_analysis()
  source = grid[0] * grid[1] + text
  tokens = (config.num_queries,) if kind == "decoder" else ()
  expected = 2 * getattr(flops, f"{kind}_layer_flops")(config, source, *tokens)
  assert expected <= analysis["flops"]
  assert analysis["flops"] == pytest.approx(expected, rel=tolerance)


def test_update_of_a_run():
  config = tiny_config()
  run = build_setup(create(config, shapes_only=True), make_mesh(1))
  one = flops.forward_flops(run.experiment.model_config, (48, 48), 40, 8)
  assert run.step_flops() == 3 * one


def test_matrix_product():
  assert matmul_flops(jnp.matmul, _spec(3, 5), _spec(5, 7)) == 2 * 3 * 5 * 7


def test_batched_product_and_contraction_over_two_axes():
  def function(q: jax.Array, k: jax.Array, w: jax.Array) -> jax.Array:
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    return jnp.einsum("bqhd,hde->bqe", q, w).sum() + logits.sum()

  count = matmul_flops(
    function, _spec(2, 3, 4, 5), _spec(2, 7, 4, 5), _spec(4, 5, 6)
  )
  attention = 2 * (2 * 4 * 3 * 7) * 5
  output = 2 * (2 * 3 * 6) * (4 * 5)
  assert count == attention + output


def test_scan_counts_its_body_once_per_iteration():
  def function(x: jax.Array, weights: jax.Array) -> jax.Array:
    @jax.checkpoint
    def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
      return jax.nn.relu(jax.jit(jnp.dot)(x, w)), None

    return jax.lax.scan(body, x, weights)[0] @ weights[0]

  count = matmul_flops(function, _spec(3, 5), _spec(11, 5, 5))
  assert count == (11 + 1) * 2 * 3 * 5 * 5


def test_convolution():
  def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  count = matmul_flops(function, _spec(2, 8, 8, 3), _spec(3, 3, 3, 16))
  assert count == 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)


def test_operations_other_than_products_cost_nothing():
  assert matmul_flops(jnp.tanh, _spec(100, 100)) == 0


def test_peak_of_known_devices_only():
  class Device:
    device_kind = "NVIDIA H200"

  assert flops.peak_flops(Device()) == pytest.approx(989e12)
  assert flops.peak_flops(jax.devices()[0]) is None
