"""Attention with a learned bias of all pairs, fused for TPU (Pallas)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Lanes of a vector register: heads are processed in groups of this width.
_LANES = 128
# Rows of queries whose scores are in registers and VMEM at a time.
_ROWS = 512
# VMEM for biases and their gradients, and what the compiler may use in all.
_BIAS_BYTES = 56 * 2**20
_VMEM_BYTES = 100 * 2**20
_LOWEST = float(np.finfo(np.float32).min)
# Contracted dimensions of a @ b, a @ b.T and a.T @ b.
_AB, _ABT, _ATB = (((1,), (0,)), ((1,), (1,)), ((0,), (0,)))


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array,
  key_mask: jax.Array | None = None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Returns softmax(q k^T + bias) v; heads lie side by side in the last axis.

  Args:
    q: scaled queries [B, Q, H * d], bfloat16 or float32.
    k: keys [B, K, H * d].
    v: values [B, K, H * d].
    bias: additive logits [H, Q, K], shared by all examples. Its gradient is
      summed in float32.
    key_mask: bool [B, K], True where the key is valid; None if all are. The
      weights of an example without a valid key are uniform.
    interpret: run on any backend, slowly.

  Returns:
    [B, Q, H * d].
  """
  heads, queries, keys = bias.shape
  if key_mask is None:
    key_mask = jnp.ones((len(k), keys), bool)
  mask = key_mask.astype(jnp.int32)[:, None]
  width = q.shape[-1] // heads
  # Narrow heads share the lanes of a group, wide ones are padded to full lanes.
  group = max(_LANES // width, 1) if _LANES % width == 0 else 1
  wide = _LANES // group if group > 1 else -(-width // _LANES) * _LANES
  q, k, v = (_pad_heads(x, heads, group, wide) for x in (q, k, v))
  bias = jnp.pad(bias, ((0, -heads % group), (0, 0), (0, 0)))
  block = _query_block(queries, group * keys, bias.dtype.itemsize)
  parts: list[Any] = [
    _attention(
      q[:, i : i + block], k, v, bias[:, i : i + block], mask, wide, interpret
    )
    for i in range(0, queries, block)
  ]
  out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
  out = out.reshape(*out.shape[:2], -1, wide)[:, :, :heads, :width]
  return out.reshape(*out.shape[:2], heads * width)


def _pad_heads(x: jax.Array, heads: int, group: int, wide: int) -> jax.Array:
  width = x.shape[-1] // heads
  if heads % group == 0 and width == wide:
    return x
  x = x.reshape(*x.shape[:2], heads, width)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -heads % group), (0, wide - width)))
  return x.reshape(*x.shape[:2], -1)


def _query_block(queries: int, columns: int, itemsize: int) -> int:
  """Returns the number of queries whose biases of a group fit into VMEM."""
  # Two buffers each for bias and gradient, and the float32 sum.
  rows = _BIAS_BYTES // (columns * (4 * itemsize + 4))
  return queries if queries <= rows else max(rows // _ROWS, 1) * _ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array,
  mask: jax.Array,
  width: int,
  interpret: bool,
) -> jax.Array:
  """Attends with whole groups of heads, all queries at once."""
  return _call(
    _forward_kernel,
    "bias_attention_forward",
    (q, k, v, bias, mask),
    (q,),
    width,
    interpret,
    products=2,
  )[0]


def _forward(*args: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _attention(*args), args[:5]


def _backward(
  width: int, interpret: bool, saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
  q, k, v, bias, mask = saved
  lanes = max(width, _LANES)
  accumulators = [
    (k.shape[1], lanes),
    (k.shape[1], lanes),
    (lanes // width, *bias.shape[1:]),
  ]
  return (
    *_call(
      _backward_kernel,
      "bias_attention_backward",
      (q, k, v, bias, mask, d_out),
      (q, k, v, bias),
      width,
      interpret,
      products=5,
      scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in accumulators],
    ),
    None,
  )


_attention.defvjp(_forward, _backward)


def _call(
  kernel: Any,
  name: str,
  inputs: tuple[jax.Array, ...],
  outputs: tuple[jax.Array, ...],
  width: int,
  interpret: bool,
  products: int,
  **options: Any,
) -> tuple[jax.Array, ...]:
  """Runs a kernel for every group of heads and every example.

  Examples are innermost: the bias of a group is read, and its gradient
  written, once for the whole batch.
  """
  bias, mask = inputs[3:5]
  batch, group = len(mask), max(_LANES // width, 1)
  heads, queries, keys = bias.shape
  size = group * width

  def spec(x: jax.Array) -> pl.BlockSpec:
    if x is bias:
      return pl.BlockSpec((group, queries, keys), lambda h, b: (h, 0, 0))
    if x is mask:
      return pl.BlockSpec((1, 1, keys), lambda h, b: (b, 0, 0))
    return pl.BlockSpec((1, x.shape[1], size), lambda h, b: (b, 0, h))

  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
  pairs = batch * heads * queries * keys
  return pl.pallas_call(
    functools.partial(kernel, width=width),
    grid=(heads // group, batch),
    in_specs=[spec(x) for x in inputs],
    out_specs=[spec(x) for x in outputs],
    out_shape=shapes,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=_VMEM_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * pairs * width,
      transcendentals=pairs,
      bytes_accessed=sum(
        math.prod(x.shape) * x.dtype.itemsize for x in (*inputs, *shapes)
      ),
    ),
    interpret=interpret,
    name=name,
    **options,
  )(*inputs)


def _forward_kernel(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  bias_ref: Any,
  mask_ref: Any,
  out_ref: Any,
  *,
  width: int,
) -> None:
  k, v, valid = k_ref[0], v_ref[0], mask_ref[0] > 0
  for rows in _row_blocks(q_ref.shape[1]):
    out: Any = None
    for head, lanes in enumerate(_heads(q_ref[0, rows].shape, width)):
      q = _only(lanes, q_ref[0, rows])
      weights, total = _softmax(q, k, bias_ref[head, rows], valid)
      own = _dot(weights.astype(v.dtype), v, _AB) * (1.0 / total)
      out = own if out is None else jnp.where(lanes, own, out)
    out_ref[0, rows] = out.astype(out_ref.dtype)


def _backward_kernel(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  bias_ref: Any,
  mask_ref: Any,
  d_out_ref: Any,
  d_q_ref: Any,
  d_k_ref: Any,
  d_v_ref: Any,
  d_bias_ref: Any,
  d_k_sum: Any,
  d_v_sum: Any,
  d_bias_sum: Any,
  *,
  width: int,
) -> None:
  k, v, valid = k_ref[0], v_ref[0], mask_ref[0] > 0
  # The logits of an example without a valid key are constants.
  live = jnp.max(mask_ref[0]).astype(v.dtype)
  d_k_sum[...] = jnp.zeros_like(d_k_sum)
  d_v_sum[...] = jnp.zeros_like(d_v_sum)

  @pl.when(pl.program_id(1) == 0)
  def _() -> None:
    d_bias_sum[...] = jnp.zeros_like(d_bias_sum)

  for rows in _row_blocks(q_ref.shape[1]):
    d_q: Any = None
    for head, lanes in enumerate(_heads(q_ref[0, rows].shape, width)):
      q, d_out = (_only(lanes, ref[0, rows]) for ref in (q_ref, d_out_ref))
      weights, total = _softmax(q, k, bias_ref[head, rows], valid)
      # Divided by the sums here, in the narrow array.
      d_out = (d_out * (1.0 / total)).astype(v.dtype)
      d_weights = _dot(d_out * live, v, _ABT)
      mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True) / total
      d_logits = weights * (d_weights - mean)
      d_bias_sum[head, rows] += d_logits
      weights, d_logits = weights.astype(v.dtype), d_logits.astype(k.dtype)
      # Zero outside of the lanes of this head, as are q and d_out.
      d_v_sum[...] += _dot(weights, d_out, _ATB)
      d_k_sum[...] += _dot(d_logits, q, _ATB)
      own = _dot(d_logits, k, _AB)
      d_q = own if d_q is None else jnp.where(lanes, own, d_q)
    d_q_ref[0, rows] = d_q.astype(d_q_ref.dtype)
  d_k_ref[0] = d_k_sum[...].astype(d_k_ref.dtype)
  d_v_ref[0] = d_v_sum[...].astype(d_v_ref.dtype)

  @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
  def _() -> None:
    d_bias_ref[...] = d_bias_sum[...].astype(d_bias_ref.dtype)


def _softmax(
  q: jax.Array, k: jax.Array, bias: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the weights before normalisation, and their sums [rows, 1]."""
  logits = _dot(q, k, _ABT) + bias.astype(jnp.float32)
  logits = jnp.where(valid, logits, _LOWEST)
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  return weights, weights.sum(-1, keepdims=True)


def _row_blocks(count: int) -> list[Any]:
  return [pl.ds(i, min(_ROWS, count - i)) for i in range(0, count, _ROWS)]


def _heads(shape: tuple[int, ...], width: int) -> list[Any]:
  """Returns for every head which elements of a block are its own."""
  if shape[1] == width:
    return [None]
  lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  return [
    (lane >= start) & (lane < start + width)
    for start in range(0, shape[1], width)
  ]


def _only(lanes: Any, x: jax.Array) -> jax.Array:
  """Sets the lanes of other heads to zero.

  A product over 128 lanes then costs the MXU what one over a head does.
  """
  return x if lanes is None else jnp.where(lanes, x, 0)


def _dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a,
    b,
    (dims, ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
