"""Multi-head attention with additive biases, as in the reference."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from narvl_jax.kernels.attend import Attend, KeyValue
from narvl_jax.kernels.layer_norm import normalize
from narvl_jax.kernels.product import product
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.parallel.constraints import (
  constrain,
  gathered,
  per_device,
  platform,
)

# Standard deviation of linear maps and tables at initialisation.
INIT_STDDEV = 0.02


def normal_init(
  *names: str | None, stddev: float = INIT_STDDEV
) -> nn.initializers.Initializer:
  """Normal(0, stddev) with logical axis names, one per dimension."""
  return nn.with_logical_partitioning(nn.initializers.normal(stddev), names)


def zeros_init(*names: str | None) -> nn.initializers.Initializer:
  """Zeros with logical axis names, one per dimension."""
  return nn.with_logical_partitioning(nn.initializers.zeros, names)


def ones_init(*names: str | None) -> nn.initializers.Initializer:
  """Ones with logical axis names, one per dimension."""
  return nn.with_logical_partitioning(nn.initializers.ones, names)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, with statistics in float32.

  Attributes:
    dtype: of the result.
    axis: logical axis name of scale and bias.
  """

  dtype: Any
  axis: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises [..., D]."""
    shape = x.shape[-1:]
    scale = self.param("scale", ones_init(self.axis), shape)
    bias = self.param("bias", zeros_init(self.axis), shape)
    return jnp.asarray(normalize(x, scale, bias, self.dtype))


def layer_norm(config: ModelConfig, name: str, axis: str = "norm") -> nn.Module:
  """Returns a `LayerNorm` in the compute type of the model."""
  return LayerNorm(config.dtype, axis, name=name)


class Projection(nn.Module):
  """`num` linear maps from D to H heads of width d, with bias."""

  config: ModelConfig
  num: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """Maps [..., D] to `num` arrays [..., H, d] in one matrix product."""
    cfg = self.config
    shape = (self.num, cfg.num_heads, cfg.head_width)
    kernel = self.param(
      "kernel",
      normal_init("embed", None, "heads", "head_width", stddev=cfg.init_stddev),
      (x.shape[-1], *shape),
    )
    bias = self.param("bias", zeros_init(None, "heads", "head_width"), shape)
    names = ("embed", None, "heads", "head_width")
    kernel = gathered(kernel, cfg.dtype, *names, scatter=x.ndim > 2)
    y, bias = x.astype(cfg.dtype), bias.astype(cfg.dtype)
    if platform() == "tpu":
      # Heads lie side by side in memory, as the attention kernel reads them.
      kernel, bias = (w.reshape(*w.shape[:-2], -1) for w in (kernel, bias))
      flat = [y @ kernel[:, i] + bias[i] for i in range(self.num)]
      return tuple(y.reshape(*y.shape[:-1], *shape[1:]) for y in flat)
    if platform() == "cpu":  # As in `product`.
      y = y.reshape(-1, x.shape[-1])
    y = jnp.einsum("...e,enhd->...nhd", y, kernel)
    y = y.reshape(*x.shape[:-1], *shape) + bias
    return tuple(y[..., i, :, :] for i in range(self.num))


def attention_scale(config: ModelConfig) -> float:
  """Returns (2 d)^-1/2: logits are the sum of content and position terms."""
  return (2 * config.head_width) ** -0.5


class PositionBias(nn.Module):
  """Attention bias of pairs of absolute positions, independent of content."""

  config: ModelConfig

  @nn.compact
  def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Maps positions of queries [Q, D] and keys [K, D] to [G, H, Q, K]."""
    (q,) = Projection(self.config, 1, name="query")(queries)
    (k,) = Projection(self.config, 1, name="key")(keys)
    q, k = (per_device(x, None, "act_heads", None) for x in (q, k))
    bias = jnp.einsum("gqhd,gkhd->ghqk", q * attention_scale(self.config), k)
    return constrain(bias, "batch", "act_heads", None, None)


class Attention(nn.Module):
  """Self- or cross-attention with a learned gain per head.

  The query is scaled after its bias is added. The output of each head is
  multiplied by `c_attn` before the output projection.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    memory: jax.Array | KeyValue | None,
    attend: Attend,
  ) -> jax.Array:
    """Attends from x to memory.

    Args:
      x: queries [B, Q, D].
      memory: [B, K, D], or its projected keys and values; None for
        self-attention.
      attend: computation between the projections, such as `attend_to`.

    Returns:
      [B, Q, D].
    """
    cfg = self.config
    if memory is None:
      q, k, v = Projection(cfg, 3, name="qkv")(x)
    else:
      (q,) = Projection(cfg, 1, name="q")(x)
      if not isinstance(memory, KeyValue):
        memory = KeyValue(*Projection(cfg, 2, name="kv")(memory))
      k, v = memory
    q, k, v = (
      constrain(y, "batch", None, "act_heads", None) for y in (q, k, v)
    )
    out = attend(q * attention_scale(cfg), KeyValue(k, v))
    gain = self.param("c_attn", ones_init("heads"), (cfg.num_heads,))
    kernel = self.param(
      "out_kernel",
      normal_init("heads", "head_width", "embed", stddev=cfg.init_stddev),
      (cfg.num_heads, cfg.head_width, cfg.width),
    )
    out_bias = self.param("out_bias", zeros_init("norm"), (cfg.width,))
    # Scales the smaller array of the product; the kernel where it is stored.
    if out.size > kernel.size:
      kernel *= gain[:, None, None]
    else:
      out *= gain.astype(cfg.dtype)[:, None]
    kernel = gathered(kernel, cfg.dtype, "heads", "head_width", "embed")
    # Heads and their widths as one axis: for a sum over two axes XLA
    # transposes the kernel on a CPU, which costs more than the product.
    out = checkpoint_name(out.reshape(*out.shape[:2], -1), "attention")
    out = product(out, kernel.reshape(-1, cfg.width))
    out = constrain(out, "batch", None, "act_embed")
    return out + out_bias.astype(cfg.dtype)
