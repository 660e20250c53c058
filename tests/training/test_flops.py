"""Counts of operations against those done by hand."""

import jax
import jax.numpy as jnp
import pytest

from narvl_jax.training.flops import matmul_flops, peak_flops


def _spec(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


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


def test_what_is_no_product_costs_nothing():
  assert matmul_flops(jnp.tanh, _spec(100, 100)) == 0


def test_peak_of_known_devices_only():
  class Device:
    device_kind = "NVIDIA H200"

  assert peak_flops(Device()) == pytest.approx(989e12)
  assert peak_flops(jax.devices()[0]) is None
