"""The kernel that adds relative biases, and models that use kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.kernels import attend
from narvl_jax.kernels import relative_bias as kernels
from narvl_jax.models import relative_bias
from tests.models import small
from tests.models.small import CONFIG


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ("grid", "text"), [((2, 3), 5), ((2, 3), 0), ((13, 11), 7)]
)
def test_kernel_adds_what_slices_add(
  grid: tuple[int, int], text: int, dtype: Any
) -> None:
  rng = np.random.default_rng(0)
  size = grid[0] * grid[1] + text
  config = dataclasses.replace(CONFIG, image_bucket_size=13)

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)

  tables = normal(1, 25**2 + 3, 2), normal(1, 31, 2)
  bias, weight = normal(1, 2, size, size), normal(1, 2, size, size)

  def run(method: str) -> Any:
    cfg = dataclasses.replace(config, attention=method)

    def loss(bias: jax.Array, image: jax.Array, text: jax.Array) -> Any:
      out = relative_bias.add_relative(bias, image, text, grid, cfg)
      return jnp.sum((out * weight).astype(jnp.float32)), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    return run(bias, *tables)

  (_, found), gradients = run("pallas")
  (_, wanted), expected = run("xla")
  np.testing.assert_array_equal(found, wanted)
  np.testing.assert_array_equal(gradients[0], expected[0])
  rtol = 1e-5 if dtype == jnp.float32 else 0.03
  for a, b in zip(gradients[1:], expected[1:], strict=True):
    assert a.dtype == dtype
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def test_long_sequences_do_not_fit() -> None:
  assert kernels.fits(jnp.zeros((1, 1, 980, 980), jnp.bfloat16))
  assert kernels.fits(jnp.zeros((2000, 2000), jnp.float32))
  assert not kernels.fits(jax.ShapeDtypeStruct((2900, 2900), jnp.bfloat16))  # pyright: ignore


@pytest.mark.parametrize("method", ["pallas", "blocks", "heads"])
def test_models_have_the_same_gradients(
  method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(attend, "_FEW_WEIGHTS", 0)
  value, wanted = small.gradient(dataclasses.replace(CONFIG, attention="xla"))
  config = dataclasses.replace(CONFIG, attention=method)
  again, found = small.gradient(config)
  assert again == pytest.approx(value, rel=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-7)
