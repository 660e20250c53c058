"""The encoder of OFA: image and text as one sequence in one transformer."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.kernels.product import product
from narvl_jax.models import positions
from narvl_jax.models.attention import (
  PositionBias,
  layer_norm,
  normal_init,
  zeros_init,
)
from narvl_jax.models.resnet import Conv, ResNet
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.models.transformer import (
  EncoderLayer,
  drop_path_rates,
  scan_layers,
)
from narvl_jax.parallel.constraints import constrain, gathered, look_up


class EncoderOutput(NamedTuple):
  """Input of the decoders.

  Attributes:
    out: [B, S, D] tokens, image first; arbitrary at padded positions.
    mask: bool [B, S], True where a token is valid.
    positions: [S, D] layer-normed absolute positions.
    image_features: [B, h, w, C] feature map of the image encoder.
  """

  out: jax.Array
  mask: jax.Array
  positions: jax.Array
  image_features: jax.Array


def normalize_image(image: jax.Array) -> jax.Array:
  """Maps uint8 pixels to [-1, 1]; floats are returned unchanged."""
  if image.dtype == jnp.uint8:
    return image.astype(jnp.float32) / 127.5 - 1.0
  return image


class ConvStem(nn.Module):
  """Features of overlapping patches by three convolutions.

  Beyond the reference, for small models, where a ResNet would dominate the
  cost of a step. Linear patches without overlap cost as much, but needed
  several times as many examples to learn shapes that cross their borders.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """Maps [B, H, W, 3] to features [B, H / p, W / p, 2 * D]."""
    cfg, half = self.config, self.config.patch_size // 2
    narrow, wide = cfg.width // 2, 2 * cfg.width
    x = self._conv("conv1", narrow, half, half, 0)(image.astype(cfg.dtype))
    x = layer_norm(cfg, "norm1", "conv_out")(nn.gelu(x))
    x = x + self._conv("conv2", narrow, 3, 1, 1)(nn.gelu(x))
    x = layer_norm(cfg, "norm2", "conv_out")(nn.gelu(x))
    return nn.gelu(self._conv("conv3", wide, 3, 2, 1)(x))

  def _conv(
    self, name: str, features: int, size: int, stride: int, padding: int
  ) -> nn.Module:
    return Conv(
      self.config,
      features,
      size,
      stride,
      padding,
      use_bias=True,
      kernel_init=nn.initializers.lecun_normal(),
      name=name,
    )


class Encoder(nn.Module):
  """Embeds image and text, adds position biases, runs the layers."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    embedding: jax.Array,
    image_mask: jax.Array,
    train: bool,
  ) -> EncoderOutput:
    """Encodes a batch.

    Args:
      image: [B, H, W, 3], float in [-1, 1] or uint8.
      text: int32 [B, T] source ids, right padded with `pad_id`.
      embedding: the tied token table [V, D].
      image_mask: bool [B]; False hides the picture of an example.
      train: enables dropout, stochastic depth and batch statistics.
    """
    cfg = self.config
    check_image_size(cfg, image.shape[1], image.shape[2])
    image = normalize_image(image)
    if cfg.image_encoder == "resnet":
      features = ResNet(cfg, name="resnet")(image, train)
    else:
      features = ConvStem(cfg, name="stem")(image)
    features = constrain(features, "batch", None, None, None)
    b, h, w, c = features.shape
    image_pos, text_pos = self._positions(h, w, text.shape[1])
    x = self._embed(
      features.reshape(b, h * w, c),
      look_up(embedding, text, cfg.dtype, "vocab", "embed"),
      image_pos,
      text_pos,
      train,
    )
    mask = jnp.concatenate(
      [
        jnp.broadcast_to(image_mask[:, None], (b, h * w)),
        text != cfg.pad_id,
      ],
      axis=1,
    )
    x = constrain(jnp.where(mask[..., None], x, 0), "batch", None, "act_embed")
    normed = jnp.concatenate(
      [
        layer_norm(cfg, "image_pos_ln")(image_pos),
        layer_norm(cfg, "pos_ln")(text_pos),
      ]
    )
    shared = {
      "position_bias": PositionBias(cfg, name="position_bias")(normed, normed),
      "key_mask": mask,
    }
    layers = scan_layers(
      EncoderLayer,
      cfg,
      depth=cfg.encoder_layers,
      train=train,
      name="layers",
      grid=(h, w),
    )
    x, _ = layers(x, self._per_layer(), shared)
    out = layer_norm(cfg, "layer_norm")(x)
    return EncoderOutput(out, mask, normed, features)

  def _embed(
    self,
    features: jax.Array,
    tokens: jax.Array,
    image_pos: jax.Array,
    text_pos: jax.Array,
    train: bool,
  ) -> jax.Array:
    """Returns the content of the sequence [B, S, D], image first."""
    cfg = self.config
    kernel = self.param(
      "image_proj_kernel",
      normal_init("conv_out", "embed", stddev=cfg.init_stddev),
      (features.shape[-1], cfg.width),
    )
    bias = self.param("image_proj_bias", zeros_init("norm"), (cfg.width,))
    types = self.param(
      "type_embedding", normal_init(None, "embed"), (2, cfg.width)
    )
    types = gathered(types, cfg.dtype, None, "embed", scatter=False)
    x = product(features, gathered(kernel, cfg.dtype, "conv_out", "embed"))
    x += bias.astype(cfg.dtype)
    if cfg.entangle_positions:
      x += image_pos
      tokens += text_pos
    x = layer_norm(cfg, "patch_layernorm_embedding")(x + types[1])
    tokens = layer_norm(cfg, "layernorm_embedding")(tokens + types[0])
    dropout = nn.Dropout(cfg.dropout, deterministic=not train)
    return jnp.concatenate([dropout(x), dropout(tokens)], axis=1)

  def _positions(
    self, h: int, w: int, length: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns absolute positions of the grid [h * w, D] and text [T, D]."""
    cfg = self.config
    check_text_length(cfg, length)
    image_init = normal_init(None, "embed")
    if cfg.entangle_positions:
      image_init = _constant_init(
        positions.image_sinusoids(cfg.image_bucket_size, cfg.width)
      )
    text = self.param(
      "embed_positions",
      normal_init(None, "embed"),
      (cfg.max_text_positions, cfg.width),
    )
    image = self.param(
      "embed_image_positions",
      image_init,
      (positions.num_image_positions(cfg.image_bucket_size), cfg.width),
    )
    ids = positions.image_position_ids(h, w, cfg.image_bucket_size)
    image = gathered(image, cfg.dtype, None, "embed", scatter=False)
    text = gathered(text, cfg.dtype, None, "embed", scatter=False)
    return image[ids], text[:length]

  def _per_layer(self) -> dict[str, jax.Array]:
    """Returns relative tables and stochastic depth of every layer."""
    cfg = self.config
    token_rows = positions.num_token_buckets(cfg.token_bucket_size)
    image_rows = positions.num_image_buckets(cfg.image_bucket_size)
    names = ("layers", None, "heads")
    return {
      "token_table": self.param(
        "token_rel_pos_table",
        normal_init(*names),
        (cfg.encoder_layers, token_rows, cfg.num_heads),
      ),
      "image_table": self.param(
        "image_rel_pos_table",
        normal_init(*names),
        (cfg.encoder_layers, image_rows, cfg.num_heads),
      ),
      "drop_path": drop_path_rates(cfg.encoder_drop_path, cfg.encoder_layers),
    }


def _constant_init(values: np.ndarray) -> nn.initializers.Initializer:
  def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del key
    return jnp.asarray(values, jnp.float32).reshape(shape)

  return nn.with_logical_partitioning(init, (None, "embed"))


def check_text_length(config: ModelConfig, length: int) -> None:
  """Raises UserError if the position table has fewer rows than `length`."""
  if length > config.max_text_positions:
    raise UserError(
      f"text of {length} tokens exceeds model.max_text_positions="
      f"{config.max_text_positions} (--config.data.max_text_length="
      f"{config.max_text_positions})"
    )


def nearest_side(config: ModelConfig, side: int) -> int:
  """Returns the valid picture side in pixels that is nearest to `side`."""
  stride = config.image_stride
  return min(max(round(side / stride), 1), config.image_bucket_size) * stride


def check_image_size(config: ModelConfig, height: int, width: int) -> None:
  """Raises UserError if the position tables do not cover a picture's grid."""
  stride, largest = config.image_stride, config.image_bucket_size
  for side in (height, width):
    if (
      side < stride
      or side > stride * largest
      or (config.image_encoder != "resnet" and side % stride)
    ):
      near = f"({nearest_side(config, height)},{nearest_side(config, width)})"
      raise UserError(
        f"image of {height}x{width} pixels does not fit a grid of "
        f"{stride}-pixel tokens of at most {largest} a side; nearest: "
        f"--config.data.image_size='{near}'"
      )
