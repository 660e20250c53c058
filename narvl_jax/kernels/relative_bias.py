"""Adds biases of relative positions to a bias of all pairs, on TPU (Pallas)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_VMEM_BYTES = 100 * 2**20


def fits(bias: jax.Array) -> bool:
  """Returns whether one head of a bias [..., S, S] fits into VMEM."""
  # Two buffers each for argument and result, and the float32 sum.
  *_, rows, columns = bias.shape
  return 1.1 * rows * columns * (4 * bias.dtype.itemsize + 4) < _VMEM_BYTES


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def add_relative(
  bias: jax.Array, rows: jax.Array, text: jax.Array, interpret: bool
) -> jax.Array:
  """Returns a bias of image and text tokens with those of both added.

  Rows of the image's bias are shifted copies of each other: queries of row r of
  the grid have the columns (h - 1 - r) w to (2 h - 1 - r) w of `rows`.

  Args:
    bias: [H, S, S], of h * w image tokens and T text tokens.
    rows: [H, w, (2 h - 1) * w]; for a query column, a row distance (ascending
      with the row of the key) and a key column.
    text: [H, T, T].
    interpret: run on any backend, slowly.

  Returns:
    [H, S, S].
  """
  height, width, split, aligned = _sizes(bias, rows, text)
  # Its columns start at full lanes of the sequence. A block is never empty.
  no_text = int(text.shape[1] == 0)
  padded = jnp.pad(text, ((0, 0), (0, no_text), (split - aligned, no_text)))

  def kernel(
    bias_ref: Any, rows_ref: Any, text_ref: Any, out_ref: Any, total: Any
  ) -> None:
    total[...] = bias_ref[0].astype(jnp.float32)
    for row in range(height):
      here = pl.ds(row * width, width), pl.ds(0, split)
      start = (height - 1 - row) * width
      part = rows_ref[0][:, start : start + split]
      total[here] = total[here] + part.astype(jnp.float32)
    if text.shape[1]:
      here = pl.ds(split, text.shape[1]), pl.ds(aligned, padded.shape[2])
      total[here] = total[here] + text_ref[0].astype(jnp.float32)
    out_ref[0] = total[...].astype(out_ref.dtype)

  return _call(
    kernel,
    "add_relative_bias",
    (bias, rows, padded),
    jax.ShapeDtypeStruct(bias.shape, bias.dtype),
    interpret,
    [pltpu.VMEM(bias.shape[1:], jnp.float32)],
  )


def _sizes(
  bias: jax.Array, rows: jax.Array, text: jax.Array
) -> tuple[int, int, int, int]:
  """Returns h, w, h * w and the last multiple of full lanes up to that."""
  width, split = rows.shape[1], bias.shape[1] - text.shape[1]
  return split // width, width, split, split // _LANES * _LANES


def _forward(
  bias: jax.Array, rows: jax.Array, text: jax.Array, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return add_relative(bias, rows, text, interpret), (rows, text)


def _backward(
  interpret: bool, saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  rows, text = saved
  height, width, split, _ = _sizes(d_out, rows, text)

  def kernel(d_out_ref: Any, d_rows_ref: Any) -> None:
    d_rows_ref[...] = jnp.zeros_like(d_rows_ref)
    for row in range(height):
      part = d_out_ref[0][row * width : (row + 1) * width, :split]
      start = (height - 1 - row) * width
      after = rows.shape[2] - split - start
      d_rows_ref[0] += jnp.pad(
        part.astype(jnp.float32), ((0, 0), (start, after))
      )

  d_rows = _call(
    kernel,
    "sum_relative_bias",
    (d_out,),
    jax.ShapeDtypeStruct(rows.shape, jnp.float32),
    interpret,
  )
  return d_out, d_rows.astype(rows.dtype), d_out[:, split:, split:]


add_relative.defvjp(_forward, _backward)


def _call(
  kernel: Any,
  name: str,
  inputs: tuple[jax.Array, ...],
  out: jax.ShapeDtypeStruct,
  interpret: bool,
  scratch: Any = (),
) -> jax.Array:
  """Runs a kernel for every head."""

  def spec(x: Any) -> pl.BlockSpec:
    return pl.BlockSpec((1, *x.shape[1:]), lambda head: (head, 0, 0))

  return pl.pallas_call(
    kernel,
    grid=(len(inputs[0]),),
    in_specs=[spec(x) for x in inputs],
    out_specs=spec(out),
    out_shape=out,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM_BYTES),
    cost_estimate=pl.CostEstimate(
      flops=0,
      transcendentals=0,
      bytes_accessed=sum(
        math.prod(x.shape) * x.dtype.itemsize for x in (*inputs, out)
      ),
    ),
    interpret=interpret,
    name=name,
  )(*inputs)
