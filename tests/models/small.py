"""A model that compiles in seconds, with random weights and inputs."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.models import NARVL, ModelConfig, make_model, model_config

B, H, W, T, N, V = 3, 16, 24, 7, 5, 253
IMAGE_TOKENS = (H // 8) * (W // 8)
CONFIG = model_config(
  "micro",
  width=32,
  mlp_width=48,
  num_heads=2,
  num_queries=N,
  vocab_size=V,
  max_text_positions=24,
  token_bucket_size=16,
  image_bucket_size=8,
  image_encoder="conv",
  patch_size=8,
  dropout=0.0,
)

Variables = dict[str, Any]


def image(rows: int = B, height: int = H, width: int = W) -> jax.Array:
  """Pictures in [-1, 1]."""
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (rows, height, width, 3))
  return jnp.asarray(x, jnp.float32)


def text(length: int = T) -> jax.Array:
  """Texts of 7, 5 and 3 tokens, padded to `length`."""
  ids = np.full((B, length), 1, np.int32)
  for row, count in enumerate((7, 5, 3)):
    ids[row, :count] = [0, *range(10 + row, 8 + row + count), 2]
  return jnp.asarray(ids)


@functools.cache
def shapes(config: ModelConfig = CONFIG) -> Any:
  """Shapes of the variables, without axis names."""

  def init() -> Any:
    model = make_model(config)
    return model.init(jax.random.key(0), image(B, 32, 32), text())

  return nn.meta.unbox(jax.eval_shape(init))


def variables(config: ModelConfig = CONFIG) -> Variables:
  """Random variables in which no part is negligible."""
  rng = np.random.default_rng(1)

  def leaf(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
    z = rng.standard_normal(x.shape, np.float32)
    name = path[-1].key
    if name in ("scale", "var", "c_attn"):
      return 1 + 0.2 * np.abs(z)
    return 0.2 * z

  return jax.tree_util.tree_map_with_path(leaf, shapes(config))


def flat(tree: Any) -> dict[tuple[str, ...], np.ndarray]:
  """The arrays of nested dicts by their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    tuple(key.key for key in path): np.asarray(x)  # pyright: ignore
    for path, x in leaves
  }


@functools.partial(jax.jit, static_argnums=0)
def apply(
  config: ModelConfig,
  values: Any,
  image: jax.Array,
  text: jax.Array,
  image_mask: jax.Array | None = None,
) -> Any:
  """Logits and intermediates of the model in evaluation mode."""
  return NARVL(config).apply(values, image, text, image_mask=image_mask)


def loss(config: ModelConfig, values: Any) -> jax.Array:
  """A scalar that depends on every parameter."""
  logits, _ = NARVL(config).apply(values, image(), text())  # pyright: ignore
  return jnp.square(jax.nn.log_softmax(logits)).mean()


@functools.cache
def compiled_gradient(config: ModelConfig = CONFIG) -> Any:
  """The compiled program of value and gradient of `loss`."""
  function = jax.jit(jax.value_and_grad(functools.partial(loss, config)))
  return function.lower(shapes(config)).compile()


@functools.cache
def gradient(config: ModelConfig = CONFIG) -> Any:
  """Value and gradient of `loss` at `variables`."""
  return jax.device_get(compiled_gradient(config)(variables(config)))
