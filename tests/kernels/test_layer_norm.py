"""LayerNorm against its definition in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.models.attention import LayerNorm


def gradients(x: Any, scale: Any, bias: Any, weight: Any, dtype: Any) -> Any:
  def loss(x: Any, params: Any) -> Any:
    out: Any = LayerNorm(dtype, "norm").apply({"params": params}, x)
    assert out.dtype == dtype
    return jnp.sum(out.astype(jnp.float32) * weight), out

  params = {"scale": scale, "bias": bias}
  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (_, out), (d_x, d_params) = run(x, params)
  assert d_x.dtype == x.dtype
  return out, d_x, d_params["scale"], d_params["bias"]


def definition(x: Any, scale: Any, bias: Any, weight: Any) -> Any:
  x, scale, bias, weight = (
    np.asarray(y, np.float64) for y in (x, scale, bias, weight)
  )
  factor = (x.var(-1, keepdims=True) + 1e-5) ** -0.5
  normal = (x - x.mean(-1, keepdims=True)) * factor
  slope = weight * scale
  d_x = factor * (
    slope
    - slope.mean(-1, keepdims=True)
    - normal * (slope * normal).mean(-1, keepdims=True)
  )
  rows = tuple(range(x.ndim - 1))
  d_scale = (weight * normal).sum(rows)
  return normal * scale + bias, d_x, d_scale, weight.sum(rows)


@pytest.mark.parametrize(
  ("mean", "dtype", "rtol"),
  [
    (0.0, jnp.float32, 1e-5),
    (300.0, jnp.float32, 1e-5),
    (3e4, jnp.float32, 1e-5),
    (0.0, jnp.bfloat16, 1e-2),
  ],
)
def test_values_and_gradients(mean: float, dtype: Any, rtol: float) -> None:
  rng = np.random.default_rng(0)

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  x = (normal(3, 5, 64) + mean).astype(dtype)
  rest = normal(64), normal(64), normal(3, 5, 64)
  found, wanted = gradients(x, *rest, dtype), definition(x, *rest)
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, rtol=0, atol=rtol * np.abs(b).max()
    )


def test_equal_values_are_finite() -> None:
  x = jnp.full((2, 64), 1000.1)
  ones = jnp.ones(64)
  for found in gradients(x, ones, ones, jnp.ones((2, 64)), jnp.float32):
    assert np.isfinite(found).all()
