"""Options that change the program or the training, not the promise."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.models import NARVL, ModelConfig, model_config
from narvl_jax.models.encoder import check_image_size
from narvl_jax.models.resnet import ResNet
from narvl_jax.models.sizes import IMAGE_ENCODERS
from narvl_jax.models.transformer import (
  Branch,
  EncoderLayer,
  drop_path_rates,
  scan_layers,
)
from tests.models import small
from tests.models.small import CONFIG


def change(**fields: Any) -> ModelConfig:
  return dataclasses.replace(CONFIG, **fields)


# Programs of the same function.


def products(config: ModelConfig) -> int:
  """Matrix products in the program of the gradient."""
  program = jax.make_jaxpr(jax.grad(lambda v: small.loss(config, v)))(
    small.shapes()
  )
  return str(program).count("dot_general[")


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_remat_gives_the_same_gradient(policy: str) -> None:
  value, gradient = small.gradient()
  again, recomputed = small.gradient(change(remat=policy))
  assert again == pytest.approx(value, rel=1e-6)
  for a, b in zip(*map(jax.tree.leaves, (gradient, recomputed)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max() + 1e-7)


def test_remat_policies_recompute_more_and_more() -> None:
  none, dots, full = (
    products(change(remat=policy)) for policy in ("none", "dots", "full")
  )
  # "dots" keeps the products with weights, not those of two activations.
  assert none < dots < full


def gradient_text(config: ModelConfig) -> str:
  """The compiled program of the gradient."""
  return small.compiled_gradient(config).as_text()


def loops(text: str) -> int:
  # Compilers for CPUs may also make a loop of a scatter.
  return len(re.findall(r' while\(.*op_name="[^"]*/while"', text))


def test_compiled_programs_differ() -> None:
  scanned = gradient_text(CONFIG)
  assert loops(scanned) > 0
  # Two layers each: nothing is left to loop over.
  assert loops(gradient_text(change(scan_unroll=2))) == 0
  recomputed = gradient_text(change(remat="full"))
  assert loops(recomputed) == loops(scanned)
  assert recomputed.count(" dot(") > scanned.count(" dot(")


def test_unrolled_layers_give_the_same_gradient() -> None:
  value, gradient = small.gradient()
  again, unrolled = small.gradient(change(scan_unroll=2))
  assert again == pytest.approx(value, rel=1e-6)
  for a, b in zip(*map(jax.tree.leaves, (gradient, unrolled)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max() + 1e-7)


def test_scan_equals_a_loop_over_layers() -> None:
  heads, rng = CONFIG.num_heads, np.random.default_rng(0)
  depth, (h, w), text = 3, (2, 2), 3
  tokens = h * w + text

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  per_layer = {
    "token_table": normal(depth, 31, heads),
    "image_table": normal(depth, 15**2 + 3, heads),
    "drop_path": drop_path_rates(0.0, depth),
  }
  shared = {
    "position_bias": normal(1, heads, tokens, tokens),
    "key_mask": jnp.ones((2, tokens), bool),
  }
  x = normal(2, tokens, CONFIG.width)
  stack = scan_layers(
    EncoderLayer, CONFIG, depth=depth, train=False, name="layers", grid=(h, w)
  )
  shapes = jax.eval_shape(stack.init, jax.random.key(0), x, per_layer, shared)
  params = jax.tree.map(
    lambda leaf: 0.2 * normal(*leaf.shape), nn.meta.unbox(shapes)
  )["params"]
  scanned: Any = stack.apply({"params": params}, x, per_layer, shared)
  for i in range(depth):

    def layer_of(tree: Any, i: int = i) -> Any:
      return jax.tree.map(lambda leaf: leaf[i], tree)

    layer = EncoderLayer(CONFIG, False, (h, w))
    outputs: Any = layer.apply(
      {"params": layer_of(params)}, x, layer_of(per_layer), shared
    )
    x = outputs[0]
  np.testing.assert_allclose(
    scanned[0], x, rtol=0, atol=1e-6 * float(jnp.abs(x).max())
  )


def test_unrolling_changes_the_program_only() -> None:
  config = change(scan_unroll=2)
  assert str(program(config)) != str(program(CONFIG))
  inputs = small.variables(), small.image(), small.text()
  np.testing.assert_allclose(
    *(small.apply(c, *inputs)[0] for c in (config, CONFIG)), rtol=0, atol=1e-5
  )
  # Never more layers than there are.
  assert str(program(change(scan_unroll=5))) == str(program(config))


def program(config: ModelConfig) -> Any:
  return jax.make_jaxpr(lambda v: small.loss(config, v))(small.shapes())


def test_the_program_does_not_grow_with_depth() -> None:
  lengths = set()
  for depth in (2, 7):
    config = change(encoder_layers=depth, decoder_layers=depth)
    function = lambda v, config=config: small.loss(config, v)  # noqa: E731
    lengths.add(len(jax.make_jaxpr(function)(small.shapes(config)).eqns))
  assert len(lengths) == 1


def test_bfloat16_is_close_to_float32() -> None:
  config = change(dtype=jnp.bfloat16)
  inputs = small.variables(), small.image(), small.text()
  exact, _ = small.apply(CONFIG, *inputs)
  logits, _ = small.apply(config, *inputs)
  error = np.abs(logits - exact)
  assert 0 < error.mean() < 0.02 * np.abs(exact).mean()
  gradient = jax.eval_shape(
    jax.grad(lambda v: small.loss(config, v)), small.shapes()
  )
  assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


# Noise in training.


def train(config: ModelConfig, key: int) -> np.ndarray:
  """Logits in training mode; compiled once for each config."""
  return np.asarray(train_program(config)(jax.random.key(key)))


def train_program(config: ModelConfig) -> Any:
  if config not in _PROGRAMS:
    values, image, text = small.variables(), small.image(), small.text()
    _PROGRAMS[config] = jax.jit(
      lambda key: NARVL(config).apply(  # pyright: ignore
        values, image, text, train=True, rngs={"dropout": key}
      )[0],
    )
  return _PROGRAMS[config]


_PROGRAMS: dict[ModelConfig, Any] = {}


@pytest.mark.parametrize(
  "fields",
  [
    {"dropout": 0.2},
    {"encoder_drop_path": 0.5},
    {"decoder_drop_path": 0.5},
  ],
  ids=lambda fields: next(iter(fields)),
)
def test_noise_is_for_training_only(fields: dict[str, float]) -> None:
  config = change(**fields)
  inputs = small.variables(), small.image(), small.text()
  quiet, _ = small.apply(CONFIG, *inputs)
  evaluation, _ = small.apply(config, *inputs)
  np.testing.assert_array_equal(evaluation, quiet)
  first = train(config, 0)
  np.testing.assert_array_equal(first, train(config, 0))
  outcomes = [train(config, key) for key in range(8)]
  assert max(np.abs(other - first).max() for other in outcomes) > 0.01
  assert max(np.abs(other - quiet).max() for other in outcomes) > 0.01


def test_training_without_noise_is_evaluation() -> None:
  inputs = small.variables(), small.image(), small.text()
  quiet, _ = small.apply(CONFIG, *inputs)
  np.testing.assert_allclose(train(CONFIG, 0), quiet, rtol=0, atol=1e-5)


def test_stochastic_depth_drops_whole_samples() -> None:
  branch = Branch(CONFIG, drop_path=0.25, train=True)
  h = jnp.ones((4000, 3, 2))
  out = np.asarray(
    branch.apply({}, h, jnp.float32(0.25), rngs={"dropout": jax.random.key(0)})
  )
  kept = out[:, 0, 0] > 0
  np.testing.assert_allclose(
    out, np.where(kept[:, None, None], h / 0.75, 0), rtol=1e-6
  )
  assert kept.mean() == pytest.approx(0.75, abs=0.03)
  same = branch.apply(
    {}, h, jnp.float32(0), rngs={"dropout": jax.random.key(0)}
  )
  np.testing.assert_array_equal(same, h)


def test_rates_of_stochastic_depth_grow_with_the_depth() -> None:
  np.testing.assert_allclose(drop_path_rates(0.3, 4), [0, 0.1, 0.2, 0.3])
  np.testing.assert_array_equal(drop_path_rates(0.3, 1), [0])


# Image encoders.

RESNET = change(image_encoder="resnet", resnet_width=4, resnet_blocks=(1, 2, 1))


def run_resnet(mode: str, train: bool) -> tuple[np.ndarray, Any, Any]:
  """Features, statistics before and after."""
  config = dataclasses.replace(RESNET, batch_norm=mode)
  values = {
    collection: tree["encoder"]["resnet"]
    for collection, tree in small.variables(config).items()
  }
  function = jax.jit(
    lambda v, x: ResNet(config).apply(v, x, train, mutable=["batch_stats"]),
  )
  features, updates = function(values, small.image(2, 32, 32))
  return features, values["batch_stats"], updates["batch_stats"]


def test_batch_norm_modes() -> None:
  evaluation, *_ = run_resnet("batch", train=False)
  frozen, before, after = run_resnet("frozen", train=True)
  # Training scales the kernels, evaluation their outputs.
  np.testing.assert_allclose(frozen, evaluation, rtol=1e-6, atol=3e-6)
  for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
    np.testing.assert_array_equal(a, b)
  batch, before, after = run_resnet("batch", train=True)
  assert np.abs(batch - evaluation).max() > 0.1
  for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
    assert (a != b).all()


def test_tokens_see_their_own_pixels_and_a_margin() -> None:
  values, text = small.variables(), small.text()
  image = small.image()
  # The margin is 12 pixels, less 4 on the right: the second token ends at 20.
  changed = image.at[:, :, 20:].set(0.5)
  a, b = (small.apply(CONFIG, values, x, text)[1] for x in (image, changed))
  differs = (a["image_features"] != b["image_features"]).any((0, 3))
  assert differs.tolist() == [[False, False, True]] * 2


@pytest.mark.parametrize("name", sorted({*IMAGE_ENCODERS} - {"resnet"}))
def test_pictures_that_do_not_divide(name: str) -> None:
  message = r"16x20 pixels .* 8-pixel tokens.*image_size='\(16,16\)'"
  with pytest.raises(UserError, match=message):
    check_image_size(change(image_encoder=name), 16, 20)
  check_image_size(RESNET, 16, 20)  # As in the reference.


@pytest.mark.parametrize(
  ("config", "size", "message"),
  [
    (CONFIG, (4, 16), r"of 4x16 pixels does not fit .* nearest: .*='\(8,16\)'"),
    (CONFIG, (16, 72), r"at most 8 a side; nearest: .*='\(16,64\)'"),
    (
      RESNET,
      (15, 32),
      r"15x32 pixels .* of 16-pixel .* nearest: .*='\(16,32\)'",
    ),
    (RESNET, (32, 130), r"--config.data.image_size='\(32,128\)'"),
  ],
)
def test_pictures_that_do_not_fit(
  config: ModelConfig, size: tuple[int, int], message: str
) -> None:
  with pytest.raises(UserError, match=message):
    jax.eval_shape(
      lambda v, x: NARVL(config).apply(v, x, small.text()),
      small.shapes(config),
      small.image(small.B, *size),
    )


def test_text_longer_than_the_table() -> None:
  message = r"text of 25 tokens exceeds model.max_text_positions=24 \(--config"
  with pytest.raises(UserError, match=message):
    jax.eval_shape(
      lambda v: NARVL(CONFIG).apply(v, small.image(), small.text(25)),
      small.shapes(),
    )


def test_entangled_positions() -> None:
  """They add the position tables to the content and nothing else."""
  config = change(entangle_positions=True)
  assert small.shapes(config) == small.shapes()
  values = small.variables()
  inputs = small.image(), small.text()
  plain, _ = small.apply(CONFIG, values, *inputs)
  entangled, _ = small.apply(config, values, *inputs)
  assert np.abs(plain - entangled).max() > 0.01
  encoder = dict(values["params"]["encoder"])
  for name in ("embed_positions", "embed_image_positions"):
    encoder[name] = np.zeros_like(encoder[name])
  values = {"params": {**values["params"], "encoder": encoder}}
  plain, _ = small.apply(CONFIG, values, *inputs)
  entangled, _ = small.apply(config, values, *inputs)
  np.testing.assert_allclose(plain, entangled, rtol=0, atol=1e-6)


def test_named_sizes_are_those_of_the_reference() -> None:
  for size in ("tiny", "medium", "base", "large", "huge"):
    config = model_config(size)
    assert config.image_encoder == "resnet"
    assert not config.entangle_positions
    assert config.init_stddev == 0.02
    assert config.batch_norm == "batch"
    assert config.dropout == 0.1


class Draw(nn.Module):
  """A layer that returns its random number and its parameter."""

  config: ModelConfig
  train: bool

  @nn.compact
  def __call__(self, x: jax.Array, *_: Any) -> tuple[jax.Array, Any]:
    value = self.param("value", nn.initializers.normal(1.0), ())
    return x, (jax.random.bits(self.make_rng("dropout")), value)


def test_layers_draw_for_themselves() -> None:
  stack = scan_layers(Draw, CONFIG, depth=5, train=True, name="layers")
  keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  (_, values), _ = stack.init_with_output(keys, 0.0, {}, {})
  for numbers in values:
    assert len(np.unique(np.asarray(numbers))) == 5
