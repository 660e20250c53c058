"""Multi-head attention with additive biases, as in the reference."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.kernels import attention as kernels
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.parallel.constraints import (
  constrain,
  gathered,
  on_shards,
  per_device,
  platform,
)

# Standard deviation of linear maps and tables at initialisation.
INIT_STDDEV = 0.02
_EPSILON = 1e-5
# Logit of a masked key.
LOWEST = float(np.finfo(np.float32).min)
# The same where the logits are sums of bfloat16 products.
_FAR_BELOW = -3e4


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
    return jnp.asarray(_normalize(x, scale, bias, self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(
  x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: Any
) -> jax.Array:
  normal, _ = _standardize(x)
  return (normal * scale + bias).astype(dtype)


def _standardize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns float32 x with mean 0 and variance 1, and the factor used.

  Mean and variance need one pass over x. The variance loses digits where the
  mean is far larger than the deviation: 1e-7 * (mean / deviation) ** 2.
  """
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
  factor = jax.lax.rsqrt(jnp.maximum(variance, 0) + _EPSILON)
  return (x - mean) * factor, factor


def _normalize_forward(
  x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  # Only the argument is kept: it is half as large as the normalised values.
  return _normalize(x, scale, bias, dtype), (x, scale)


def _normalize_backward(
  dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  del dtype
  x, scale = saved
  normal, factor = _standardize(x)
  gradient = gradient.astype(jnp.float32)
  rows = tuple(range(x.ndim - 1))
  d_scale, d_bias = (gradient * normal).sum(rows), gradient.sum(rows)
  gradient *= scale
  slope = (gradient * normal).mean(-1, keepdims=True)
  d_x = factor * (gradient - gradient.mean(-1, keepdims=True) - normal * slope)
  return d_x.astype(x.dtype), d_scale, d_bias


_normalize.defvjp(_normalize_forward, _normalize_backward)


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
    y = jnp.einsum("...e,enhd->...nhd", x.astype(cfg.dtype), kernel)
    y += bias.astype(cfg.dtype)
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


def add_bias(logits: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a bias [G, H, Q, K] to logits [B, H, Q, K], in float32."""
  logits, bias = logits.astype(jnp.float32), bias.astype(jnp.float32)
  grouped = logits.reshape(len(bias), -1, *logits.shape[1:])
  return (grouped + bias[:, None]).reshape(logits.shape)


class KeyValue(NamedTuple):
  """Projected keys and values.

  Attributes:
    key: [B, K, H, d].
    value: [B, K, H, d].
  """

  key: jax.Array
  value: jax.Array


# (queries [B, Q, H, d], their own keys and values) -> [B, Q, H, d].
Attend = Callable[[jax.Array, KeyValue], jax.Array]


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
    kernel = gathered(kernel, cfg.dtype, "heads", "head_width", "embed")
    # Scales the smaller array of the product.
    gain = gain.astype(cfg.dtype)[:, None]
    if out.size > kernel.size:
      kernel *= gain[..., None]
    else:
      out *= gain
    # Heads and their widths as one axis: for a sum over two axes XLA
    # transposes the kernel on a CPU, which costs more than the product.
    out = out.reshape(*out.shape[:2], -1) @ kernel.reshape(-1, cfg.width)
    out = constrain(out, "batch", None, "act_embed")
    return out + out_bias.astype(cfg.dtype)


def attend_to(
  bias: jax.Array,
  key_mask: jax.Array | None,
  record: Callable[[jax.Array], object] = lambda weights: None,
) -> Attend:
  """Returns softmax attention with an additive bias.

  Args:
    bias: additive logits [G, H, Q, K], each shared by B / G consecutive
      examples.
    key_mask: bool [B, K], True where the key is valid; None if all are.
    record: is called with the weights, float32 [B, H, Q, K].
  """

  def attend(q: jax.Array, own: KeyValue) -> jax.Array:
    logits = add_bias(jnp.einsum("bqhd,bkhd->bhqk", q, own.key), bias)
    if key_mask is not None:
      logits = jnp.where(key_mask[:, None, None, :], logits, LOWEST)
    weights = jax.nn.softmax(logits)
    record(weights)
    weights = weights.astype(own.value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, own.value)

  return attend


def attend_by(
  method: str, bias: jax.Array, key_mask: jax.Array | None
) -> Attend:
  """Returns what `attend_to` does, by a method of docs/attention_kernel.md."""
  ways = {
    "xla": attend_to,
    "blocks": attend_in_blocks,
    "pallas": attend_fused,
    "cudnn": attend_cudnn,
  }
  return ways[method](bias, key_mask)


def attend_in_blocks(
  bias: jax.Array, key_mask: jax.Array | None, block: int = 256
) -> Attend:
  """Attends with `block` queries at a time.

  The backward pass computes the weights again, so that those of all queries
  never exist at once.
  """

  def attend(q: jax.Array, own: KeyValue) -> jax.Array:
    count, padding = q.shape[1], -q.shape[1] % block

    def split(x: jax.Array, axis: int) -> jax.Array:
      widths = [(0, padding if i == axis else 0) for i in range(x.ndim)]
      shape = (*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
      return jnp.moveaxis(jnp.pad(x, widths).reshape(shape), axis, 0)

    @jax.checkpoint
    def attend_block(part: tuple[jax.Array, jax.Array]) -> jax.Array:
      return attend_to(part[1], key_mask)(part[0], own)

    out = jax.lax.map(attend_block, (split(q, 1), split(bias, 2)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(len(q), -1, *q.shape[2:])[:, :count]

  return attend


def attend_fused(bias: jax.Array, key_mask: jax.Array | None) -> Attend:
  """Attends by the kernel for TPU; other backends interpret it, slowly."""
  interpret = platform() != "tpu"

  def kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, mask: jax.Array
  ) -> jax.Array:
    flat = [x.reshape(*x.shape[:2], -1) for x in (q, k, v)]
    out = kernels.attention(
      flat[0], flat[1], flat[2], bias[0], mask, interpret=interpret
    )
    return out.reshape(q.shape)

  return _by_shards(kernel, bias, key_mask)


def attend_cudnn(
  bias: jax.Array, key_mask: jax.Array | None, implementation: Any = "cudnn"
) -> Attend:
  """Attends by cuDNN's fused attention, which needs bfloat16 and a GPU.

  cuDNN would add a mask to a copy of the bias for every example. Instead a
  further feature of the keys lowers the logits of masked ones.
  """

  def kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, mask: jax.Array
  ) -> jax.Array:
    # It takes even lengths and widths that divide by 8.
    odd = [(0, x.shape[1] % 2) for x in (q, k)]
    q, k, v, mask = (
      jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *[(0, 0)] * (x.ndim - 2)))
      for x in (q, k, v, mask)
    )
    bias = jnp.pad(bias, ((0, 0), (0, 0), *odd))
    more = 8 + -q.shape[-1] % 8
    wide = [jnp.pad(x, (*[(0, 0)] * 3, (0, more))) for x in (q, k, v)]
    feature = q.shape[-1]
    wide[0] = wide[0].at[..., feature].set(1)
    lowered = jnp.where(mask, 0, _FAR_BELOW).astype(k.dtype)
    wide[1] = wide[1].at[..., feature].set(lowered[:, :, None])
    out = jax.nn.dot_product_attention(
      *wide, bias=bias, scale=1.0, implementation=implementation
    )
    return out[:, : q.shape[1] - odd[0][1], :, :feature]

  return _by_shards(kernel, bias, key_mask)


def _by_shards(
  kernel: Callable[..., jax.Array],
  bias: jax.Array,
  key_mask: jax.Array | None,
) -> Attend:
  """Runs `kernel(q, k, v, bias, mask)` on each device's part."""

  def attend(q: jax.Array, own: KeyValue) -> jax.Array:
    mask = key_mask
    if mask is None:
      mask = jnp.ones(own.key.shape[:2], bool)
    heads = ("batch", None, "act_heads", None)
    pairs = ("batch", "act_heads", None, None)
    names = (heads, heads, heads, pairs, ("batch", None))
    return on_shards(kernel, names, 0)(q, *own, bias, mask)

  return attend
