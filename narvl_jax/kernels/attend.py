"""Ways to compute attention with an additive bias."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.kernels.attention import attention
from narvl_jax.parallel.constraints import on_shards, platform

# Logit of a masked key.
LOWEST = float(np.finfo(np.float32).min)
# The same where the logits are sums of bfloat16 products.
_FAR_BELOW = -3e4
# So many weights fit into the cache of a CPU.
_FEW_WEIGHTS = 2**20
# Logical axes of queries, keys and values.
_HEADS = ("batch", None, "act_heads", None)


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
    "heads": attend_by_heads,
    "blocks": attend_in_blocks,
    "pallas": attend_fused,
    "cudnn": attend_cudnn,
  }
  return ways[method](bias, key_mask)


def attend_by_heads(
  bias: jax.Array,
  key_mask: jax.Array | None,
  more: Sequence[jax.Array] = (),
  add: Callable[..., jax.Array] = lambda bias: bias,
) -> Attend:
  """Attends with one head at a time, so that its weights stay in the cache.

  The backward pass computes the weights again.

  Args:
    bias: as for `attend_to`.
    key_mask: as for `attend_to`.
    more: what further biases are made of, [G, H, ...] each.
    add: adds them to the bias, or to logits, of some heads: arguments are that
      array [..., H, Q, K] and the heads' part of `more`.
  """

  def kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *biases: Any
  ) -> jax.Array:
    if q[:, :, :, 0].size * k.shape[1] <= _FEW_WEIGHTS:
      return attend_to(add(*biases), mask)(q, KeyValue(k, v))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_head(head: Any) -> jax.Array:
      (q, k, v), (bias, *more) = head
      logits = jnp.einsum("bqd,bkd->bqk", q, k).astype(jnp.float32) + bias
      logits = add(logits[:, None], *(x[None, None] for x in more))[:, 0]
      logits = jnp.where(mask[:, None], logits, LOWEST)
      largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
      weights = jnp.exp(logits - largest)
      # Divides the smaller array.
      out = jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v)
      total = weights.sum(-1, keepdims=True)
      return (out.astype(jnp.float32) / total).astype(v.dtype)

    heads = [x.transpose(2, 0, 1, 3) for x in (q, k, v)]
    out = jax.lax.map(attend_head, (heads, [x[0] for x in biases]))
    return out.transpose(1, 2, 0, 3)

  def attend(q: jax.Array, own: KeyValue) -> jax.Array:
    mask = key_mask
    if mask is None:
      mask = jnp.ones(own.key.shape[:2], bool)
    biases = (bias, *more)
    per_head = [("batch", "act_heads", *[None] * (x.ndim - 2)) for x in biases]
    names = (*[_HEADS] * 3, ("batch", None), *per_head)
    return on_shards(kernel, names, 0)(q, *own, mask, *biases)

  return attend


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
    out = attention(
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
    pairs = ("batch", "act_heads", None, None)
    names = (*[_HEADS] * 3, pairs, ("batch", None))
    return on_shards(kernel, names, 0)(q, *own, bias, mask)

  return attend
