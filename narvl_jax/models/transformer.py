"""Pre-norm transformer layers of encoder and decoder, scanned over depth."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from narvl_jax.kernels.attend import (
  Attend,
  KeyValue,
  attend_by,
  attend_by_heads,
  attend_to,
)
from narvl_jax.kernels.linear_bias import add_to_rows
from narvl_jax.kernels.product import product
from narvl_jax.models.attention import (
  Attention,
  layer_norm,
  normal_init,
  zeros_init,
)
from narvl_jax.models.relative_bias import add_relative, token_bias
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.parallel.constraints import (
  constrain,
  gathered,
  per_device,
  platform,
)


class FeedForward(nn.Module):
  """Linear, exact GELU, LayerNorm, linear."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, S, D] to [B, S, D]."""
    cfg = self.config
    w1 = self.param(
      "fc1_kernel",
      normal_init("embed", "mlp", stddev=cfg.init_stddev),
      (cfg.width, cfg.mlp_width),
    )
    b1 = self.param("fc1_bias", zeros_init("mlp"), (cfg.mlp_width,))
    w2 = self.param(
      "fc2_kernel",
      normal_init("mlp", "embed", stddev=cfg.init_stddev),
      (cfg.mlp_width, cfg.width),
    )
    b2 = self.param("fc2_bias", zeros_init("norm"), (cfg.width,))
    w1 = gathered(w1, cfg.dtype, "embed", "mlp")
    h = add_to_rows(product(x.astype(cfg.dtype), w1), b1.astype(cfg.dtype))
    h = constrain(h, "batch", None, "act_mlp")
    h = layer_norm(cfg, "ffn_layernorm", "mlp")(_gelu(h))
    w2 = gathered(w2, cfg.dtype, "mlp", "embed")
    h = constrain(product(h, w2), "batch", None, "act_embed")
    return add_to_rows(h, b2.astype(cfg.dtype))


def _gelu(x: jax.Array) -> jax.Array:
  """Returns the exact GELU.

  In bfloat16 the error function would lose most of its digits. On a TPU `erfc`,
  which `jax.nn.gelu` uses, takes twice as long as `erf`, and is more accurate
  only where the result is below 1e-6.
  """
  y = x.astype(jnp.float32)
  if platform() != "tpu":
    return jax.nn.gelu(y, approximate=False).astype(x.dtype)
  y = y * (0.5 + 0.5 * jax.lax.erf(y * np.float32(np.sqrt(0.5))))
  return y.astype(x.dtype)


class Branch(nn.Module):
  """Dropout and stochastic depth of one residual branch.

  Attributes:
    drop_path: largest rate of the stack; 0 disables stochastic depth.
    train: False disables both.
  """

  config: ModelConfig
  drop_path: float
  train: bool

  @nn.compact
  def __call__(self, h: jax.Array, rate: jax.Array) -> jax.Array:
    """Drops elements, then whole examples with probability `rate`."""
    if self.train and self.config.dropout:
      h = self._keep(h, self.config.dropout, h.shape)
    if self.train and self.drop_path:
      h = self._keep(h, rate, (h.shape[0],) + (1,) * (h.ndim - 1))
    return h

  def _keep(
    self, h: jax.Array, rate: jax.Array | float, shape: tuple[int, ...]
  ) -> jax.Array:
    """Sets parts of h to zero with probability `rate`."""
    rate = jnp.asarray(rate, jnp.float32)
    kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
    # Random numbers cost more than reading the mask again: made once, for both
    # passes and for all that XLA computes from it.
    kept = checkpoint_name(jax.lax.optimization_barrier(kept), "dropout")
    return jnp.where(kept, h / (1 - rate).astype(h.dtype), 0)


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward block.

  Attributes:
    grid: (height, width) of the image in tokens.
  """

  config: ModelConfig
  train: bool
  grid: tuple[int, int]

  @nn.compact
  def __call__(
    self, x: jax.Array, per_layer: dict[str, Any], shared: dict[str, Any]
  ) -> tuple[jax.Array, None]:
    """Maps [B, S, D] to [B, S, D].

    Args:
      x: tokens, image first.
      per_layer: relative biases "token_table" [R, H] and "image_table"
        [R, H], and the scalar "drop_path".
      shared: "position_bias" [G, H, S, S] and "key_mask" [B, S].

    Returns:
      The tokens, and None as the scan's output per layer.
    """
    cfg, rate = self.config, per_layer["drop_path"]
    branch = Branch(cfg, cfg.encoder_drop_path, self.train)
    bias = shared["position_bias"]
    image, text = (
      per_device(per_layer[name].astype(bias.dtype), None, "heads")
      for name in ("image_table", "token_table")
    )
    mask = shared["key_mask"]
    if cfg.attention_method == "heads":
      attend = attend_by_heads(
        bias,
        mask,
        (image.swapaxes(1, 2), text.swapaxes(1, 2)),
        lambda to, image, text: add_relative(
          to, image.swapaxes(1, 2), text.swapaxes(1, 2), self.grid, cfg
        ),
      )
    else:
      bias = add_relative(bias, image, text, self.grid, cfg)
      attend = attend_by(cfg.attention_method, bias, mask)
    h = layer_norm(cfg, "self_attn_layer_norm")(x)
    h = Attention(cfg, name="self_attn")(h, None, attend)
    x = x + branch(layer_norm(cfg, "attn_ln")(h), rate)
    h = layer_norm(cfg, "final_layer_norm")(x)
    return x + branch(FeedForward(cfg, name="ffn")(h), rate), None


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention and feed-forward block."""

  config: ModelConfig
  train: bool

  @nn.compact
  def __call__(
    self, x: jax.Array, per_layer: dict[str, Any], shared: dict[str, Any]
  ) -> tuple[jax.Array, None]:
    """Maps [B, N, D] to [B, N, D].

    Args:
      x: decoder states.
      per_layer: relative bias "token_table" [R, H], and the scalar
        "drop_path".
      shared: "self_bias" [G, H, N, N], "cross_bias" [G, H, N, S], "memory"
        [B, S, D], "memory_mask" [B, S], "self_mask" [B, N] or None.

    Returns:
      The states, and None as the scan's output per layer.
    """
    cfg = self.config
    bias = shared["self_bias"]
    table = per_layer["token_table"].astype(bias.dtype)
    table = per_device(table, None, "heads")
    bias += token_bias(table, x.shape[1], cfg.token_bucket_size)
    x = decoder_layer(
      cfg,
      x,
      shared["memory"],
      attend_to(bias, shared["self_mask"]),
      attend_to(
        shared["cross_bias"],
        shared["memory_mask"],
        # Kept only if "intermediates" is mutable; otherwise it is no operation.
        lambda weights: self.sow("intermediates", "cross_attention", weights),
      ),
      Branch(cfg, cfg.decoder_drop_path, self.train),
      per_layer["drop_path"],
    )
    return x, None


def decoder_layer(
  cfg: ModelConfig,
  x: jax.Array,
  memory: jax.Array | KeyValue,
  attend_self: Attend,
  attend_memory: Attend,
  branch: Callable[[jax.Array, jax.Array], jax.Array],
  rate: jax.Array,
) -> jax.Array:
  """Creates and runs the modules of a decoder layer.

  Call it in the `nn.compact` method of the layer's module.

  Args:
    cfg: the architecture.
    x: decoder states [B, N, D].
    memory: encoder output [B, S, D], or its keys and values.
    attend_self: self-attention.
    attend_memory: cross-attention.
    branch: (h, rate) -> the update that is added to the states.
    rate: rate of stochastic depth.

  Returns:
    [B, N, D].
  """
  h = layer_norm(cfg, "self_attn_layer_norm")(x)
  h = Attention(cfg, name="self_attn")(h, None, attend_self)
  x = x + branch(layer_norm(cfg, "self_attn_ln")(h), rate)
  h = layer_norm(cfg, "encoder_attn_layer_norm")(x)
  h = Attention(cfg, name="encoder_attn")(h, memory, attend_memory)
  x = x + branch(layer_norm(cfg, "cross_attn_ln")(h), rate)
  h = layer_norm(cfg, "final_layer_norm")(x)
  return x + branch(FeedForward(cfg, name="ffn")(h), rate)


# Cheap to keep and expensive to compute.
_SAVED = jax.checkpoint_policies.save_only_these_names("dropout", "attention")
_POLICIES = {
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVED
  ),
  "full": _SAVED,
}


def scan_layers(
  layer: type[nn.Module],
  config: ModelConfig,
  *,
  depth: int,
  train: bool,
  name: str,
  **fields: Any,
) -> nn.Module:
  """Stacks `depth` layers as one scan; parameters get a leading axis.

  The result is called with (x, per_layer, shared). Arrays of `per_layer` have
  a leading axis of size `depth`; `shared` is passed to every layer unchanged.

  Args:
    layer: class of the layer.
    config: the architecture.
    depth: number of layers.
    train: field of the layer.
    name: of the stack.
    **fields: further fields of the layer.
  """
  if config.remat != "none":
    layer = nn.remat(layer, policy=_POLICIES[config.remat], prevent_cse=False)
  in_axes: Any = (0, nn.broadcast)  # Flax annotates it as int only.
  stack = nn.scan(
    layer,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=in_axes,
    length=depth,
    unroll=min(config.scan_unroll, depth),
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return stack(config, train, **fields, name=name)


def drop_path_rates(rate: float, depth: int) -> jax.Array:
  """Returns rates that grow linearly from 0 to `rate`, float32 [depth]."""
  return jnp.linspace(0.0, rate, depth, dtype=jnp.float32)
