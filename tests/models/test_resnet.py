"""The program of the ResNet on each platform, and its batch statistics."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.models import model_config, resnet
from narvl_jax.models.resnet import BatchNorm, ResNet

CONFIG = model_config("micro", resnet_blocks=(3, 3, 1), resnet_width=8)
IMAGE = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype("f4")


@functools.cache
def _variables() -> Any:
  return nn.unbox(ResNet(CONFIG).init(jax.random.key(0), IMAGE, False))


def _gradient(params: Any) -> Any:
  def loss(params: Any) -> Any:
    out, new = ResNet(CONFIG).apply(
      {"params": params, "batch_stats": _variables()["batch_stats"]},
      IMAGE,
      True,
      mutable=["batch_stats"],
    )
    # Of squares, BatchNorm leaves a gradient of rounding errors.
    return jnp.vdot(out, jnp.sin(jnp.arange(out.size))), new

  return jax.grad(loss, has_aux=True)(params)


def _program(monkeypatch: pytest.MonkeyPatch, platform: str) -> Any:
  monkeypatch.setattr(resnet, "platform", lambda: platform)
  return jax.jit(lambda p: _gradient(p)).lower(_variables()["params"])


def test_only_the_program_of_a_cpu_is_unrolled(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  programs = [_program(monkeypatch, name) for name in ("cpu", "tpu")]
  loops = [p.as_text().count("stablehlo.while") for p in programs]
  assert loops == [0, 2 * 2]  # Two stages, forward and backward.
  # A product for a kernel of one pixel. Besides the stem, which has no gradient
  # by the picture: one convolution forward, two backward, none a second time in
  # each of five different blocks. Only some versions of jax write equal blocks
  # of the unrolled program once.
  unrolled, scanned = (
    program.as_text().count("stablehlo.convolution") for program in programs
  )
  assert scanned == 2 + 3 * 5
  assert unrolled in (2 + 3 * 5, 2 + 3 * 7)
  a, b = (p.compile()(_variables()["params"]) for p in programs)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), a, b
  )


def test_half_precision_is_as_far_from_float32_in_both_programs(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """At random weights rounding noise is as large as the gradient itself."""
  config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)

  def gradients(platform: str) -> np.ndarray:
    program = _program(monkeypatch, platform).compile()
    found, _ = program(_variables()["params"])
    return np.concatenate([x.ravel() for x in jax.tree.leaves(found)])

  exact = gradients("cpu")
  monkeypatch.setattr(f"{__name__}.CONFIG", config)
  errors = [
    np.linalg.norm(gradients(platform) - exact) / np.linalg.norm(exact)
    for platform in ("cpu", "tpu")
  ]
  assert max(errors) < 1.2 * min(errors)


@dataclasses.dataclass(frozen=True)
class _Same:
  """A convolution that returns its input."""

  features: int

  def __call__(self, x: jax.Array) -> jax.Array:
    return x


def test_frozen_statistics_scale_the_kernels() -> None:
  """Equal to scaling the outputs, as evaluation does."""
  config = dataclasses.replace(CONFIG, batch_norm="frozen")
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: jnp.asarray(x + rng.uniform(0.1, 0.3, x.shape), jnp.float32),
    _variables(),
  )
  image = jnp.asarray(rng.normal(size=(2, 32, 32, 3)), jnp.float32)

  def loss(params: Any, train: bool) -> Any:
    out = ResNet(config).apply({**variables, "params": params}, image, train)
    return jnp.vdot(out, jnp.sin(jnp.arange(out.size))) / out.size  # pyright: ignore

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  expected, found = (run(variables["params"], train) for train in (False, True))
  for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * np.abs(a).max())


def test_variance_of_values_with_a_large_mean() -> None:
  rng = np.random.default_rng(1)
  means, deviations = np.array([0.0, 30.0, -1e3, 1e4]), np.array([1, 1, 0.5, 2])
  x = (means + deviations * rng.normal(size=(4, 16, 16, 4))).astype(np.float32)
  norm = BatchNorm(CONFIG)
  same: Any = _Same(4)
  variables = nn.unbox(norm.init(jax.random.key(0), same, x, False))
  expected = (x - x.mean((0, 1, 2), np.float64)) / x.std((0, 1, 2), np.float64)
  # With the running mean of a run, and of the first update.
  running = {**variables["batch_stats"], "mean": jnp.asarray(means * 1.01)}
  variables |= {"batch_stats": running}
  out, new = norm.apply(variables, same, x, True, mutable=["batch_stats"])
  np.testing.assert_allclose(out, expected, atol=4e-3)
  np.testing.assert_allclose(
    np.asarray(new["batch_stats"]["var"]),
    0.9 + 0.1 * x.var((0, 1, 2), np.float64, ddof=1),
    rtol=1e-3,
  )
  running["mean"] = jnp.zeros(4)
  out = norm.apply(variables, same, x, True, mutable=["batch_stats"])[0]
  np.testing.assert_allclose(out[..., :2], expected[..., :2], atol=1e-3)
  assert np.isfinite(out).all()


@pytest.mark.parametrize("size", [(8, 7), (1, 2)])
def test_maxima_of_windows_are_the_same_on_each_platform(
  size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
  x = jax.nn.relu(jax.random.normal(jax.random.key(0), (2, *size, 3)))

  def run(platform: str) -> Any:
    monkeypatch.setattr(resnet, "platform", lambda: platform)

    def loss(x: jax.Array) -> Any:
      out = resnet._max_pool(jax.nn.relu(x))
      return jnp.vdot(out, jnp.cos(jnp.arange(out.size))), out

    return jax.value_and_grad(loss, has_aux=True)(x)

  for a, b in zip(*map(jax.tree.leaves, map(run, ("cpu", "tpu"))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
