"""Attention kernels and biases against plain attention."""

import dataclasses
import importlib.util
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.ahead_of_time.topology import get_topology
from narvl_jax.kernels import attend
from narvl_jax.kernels import attention as kernels
from narvl_jax.kernels.attend import (
  KeyValue,
  attend_by,
  attend_by_heads,
  attend_cudnn,
  attend_in_blocks,
  attend_to,
)
from narvl_jax.models.sizes import ATTENTIONS
from narvl_jax.parallel import activation_rules, make_mesh
from narvl_jax.parallel.constraints import per_device
from narvl_jax.parallel.rules import DEFAULT_RULES
from tests.models.small import CONFIG


def arrays(
  batch: int, queries: int, keys: int, heads: int, width: int, dtype: Any
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
  """(q, k, v, bias), key mask, and a weight for every output.

  The last example has no valid key, the others have fewer and fewer.
  """
  rng = np.random.default_rng(0)

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)

  q = normal(batch, queries, heads, width) * width**-0.5
  k, v = (normal(batch, keys, heads, width) for _ in range(2))
  count = keys - 3 * np.arange(batch)
  count[1:][-1:] = 0
  mask = jnp.asarray(np.arange(keys) < count[:, None])
  bias = normal(heads, queries, keys)
  return (q, k, v, bias), mask, normal(*q.shape)


def value_and_gradients(
  attend: Any, inputs: Any, mask: Any, weight: Any
) -> Any:
  """Sum of the weighted outputs, its gradients, and the outputs."""

  def loss(q: Any, k: Any, v: Any, bias: Any) -> Any:
    out = attend(bias[None], mask)(q, KeyValue(k, v))
    assert out.dtype == v.dtype
    return jnp.sum((out * weight).astype(jnp.float32)), out

  run = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
  (value, out), gradients = jax.jit(run)(*inputs)
  return value, (out, *gradients)


def assert_close(found: Any, wanted: Any, rtol: float) -> None:
  for name, a, b in zip(
    ("out", "q", "k", "v", "bias"), found, wanted, strict=True
  ):
    assert a.dtype == b.dtype
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(
      a, b, rtol=0, atol=rtol * np.abs(b).max(), err_msg=name
    )


def pallas(bias: jax.Array, mask: jax.Array | None) -> Any:
  return attend_by("pallas", bias, mask)


@pytest.mark.parametrize(
  ("batch", "queries", "keys", "heads", "width"),
  [
    (3, 150, 150, 2, 64),
    (1, 37, 37, 3, 32),  # Heads that do not fill a group.
    (2, 19, 19, 2, 80),  # Wider than half of the lanes.
    (2, 24, 40, 1, 128),
    (2, 13, 13, 2, 16),
  ],
)
def test_kernel_is_plain_attention(
  batch: int, queries: int, keys: int, heads: int, width: int
) -> None:
  case = arrays(batch, queries, keys, heads, width, jnp.float32)
  value, found = value_and_gradients(pallas, *case)
  expected, wanted = value_and_gradients(attend_to, *case)
  assert float(value) == pytest.approx(float(expected), rel=1e-5)
  assert_close(found, wanted, 1e-5)


def test_kernel_in_bfloat16() -> None:
  case = arrays(2, 140, 140, 2, 64, jnp.bfloat16)
  _, found = value_and_gradients(pallas, *case)
  _, wanted = value_and_gradients(attend_to, *case)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), case)
  _, exact = value_and_gradients(attend_to, exact[0], case[1], exact[2])
  rounded = [x.astype(jnp.bfloat16) for x in exact]
  assert_close(found, rounded, 0.02)
  # No farther from the exact result than attention with bfloat16 weights.

  def error(results: Any) -> float:
    return sum(
      float(jnp.abs(a.astype(jnp.float32) - b).mean() / jnp.abs(b).mean())
      for a, b in zip(results, exact, strict=True)
    )

  assert error(found) < 1.1 * error(wanted)


def test_rows_and_biases_beyond_one_block(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  case = arrays(2, 40, 40, 2, 64, jnp.float32)
  _, wanted = value_and_gradients(attend_to, *case)
  monkeypatch.setattr(kernels, "_ROWS", 16)
  _, found = value_and_gradients(pallas, *case)
  assert_close(found, wanted, 1e-5)
  # 16 queries of two heads a call: two buffers of bias and gradient, a sum.
  monkeypatch.setattr(kernels, "_BIAS_BYTES", 17 * 2 * 40 * 5 * 4)
  calls = []
  original = kernels._attention

  def spy(q: Any, *rest: Any) -> Any:
    calls.append(q.shape[1])
    return original(q, *rest)

  monkeypatch.setattr(kernels, "_attention", spy)
  _, found = value_and_gradients(pallas, *case)
  assert set(calls) == {16, 8}
  assert_close(found, wanted, 1e-5)


def test_without_a_mask() -> None:
  inputs, _, weight = arrays(2, 9, 9, 2, 64, jnp.float32)
  for method in ("pallas", "blocks", "heads", "xla"):
    found = value_and_gradients(
      lambda bias, mask, m=method: attend_by(m, bias, mask),
      inputs,
      None,
      weight,
    )
    wanted = value_and_gradients(attend_to, inputs, None, weight)
    assert_close(found[1], wanted[1], 1e-5)


def test_blocks_of_queries_are_plain_attention() -> None:
  case = arrays(3, 21, 21, 2, 16, jnp.float32)

  def blocks(bias: jax.Array, mask: jax.Array | None) -> Any:
    return attend_in_blocks(bias, mask, 8)

  _, found = value_and_gradients(blocks, *case)
  _, wanted = value_and_gradients(attend_to, *case)
  assert_close(found, wanted, 1e-5)


def test_single_heads_are_plain_attention(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(attend, "_FEW_WEIGHTS", 0)
  case = arrays(3, 21, 19, 2, 16, jnp.float32)
  _, found = value_and_gradients(attend_by_heads, *case)
  _, wanted = value_and_gradients(attend_to, *case)
  assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize(
  ("method", "settings"),
  [(attend_in_blocks, {"block": 32}), (attend_by_heads, {})],
)
def test_parts_of_the_weights_need_less_memory(
  method: Any, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(attend, "_FEW_WEIGHTS", 0)
  inputs, mask, _ = arrays(4, 256, 256, 4, 16, jnp.float32)

  def temporaries(attend: Any) -> int:
    def loss(q: Any, k: Any, v: Any, bias: Any) -> Any:
      return attend(bias[None], mask)(q, KeyValue(k, v)).sum()

    compiled: Any = (
      jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*inputs).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  plain = temporaries(attend_to)
  parts = temporaries(lambda bias, mask: method(bias, mask, **settings))
  assert plain > 4 * 4 * 4 * 256 * 256
  assert parts < plain / 2


def test_arguments_of_cudnn_are_plain_attention() -> None:
  """By XLA's implementation: there is no GPU here."""
  inputs, mask, weight = arrays(3, 21, 21, 2, 20, jnp.bfloat16)
  # Weights of an example without a valid key are arbitrary.
  mask = mask.at[-1, 2].set(True)

  def cudnn(bias: jax.Array, mask: jax.Array | None) -> Any:
    return attend_cudnn(bias, mask, "xla")

  _, found = value_and_gradients(cudnn, inputs, mask, weight)
  _, wanted = value_and_gradients(attend_to, inputs, mask, weight)
  assert_close(found, wanted, 0.02)


@pytest.mark.parametrize("method", ["pallas", "blocks", "heads"])
def test_on_a_mesh(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(attend, "_FEW_WEIGHTS", 0)
  inputs, mask, weight = arrays(8, 12, 12, 4, 32, jnp.float32)
  _, wanted = value_and_gradients(attend_to, inputs, mask, weight)

  def attend_with(bias: jax.Array, mask: jax.Array | None) -> Any:
    bias = per_device(bias[0], "act_heads", None, None)
    assert bias.shape == (4, 4, 12, 12)
    return attend_by(method, bias, mask)

  with (
    jax.set_mesh(make_mesh(2, 2, 2)),
    nn.logical_axis_rules(activation_rules(DEFAULT_RULES)),
  ):
    _, found = value_and_gradients(attend_with, inputs, mask, weight)
  assert_close(found, wanted, 1e-5)


def test_method_follows_the_devices() -> None:
  assert CONFIG.attention_method == "heads"
  for name in ATTENTIONS[1:]:
    config = dataclasses.replace(CONFIG, attention=name, dtype=jnp.bfloat16)
    assert config.attention_method == name
  if importlib.util.find_spec("libtpu") is not None:
    mesh = make_mesh(devices=get_topology("v4:2x2x1").devices[:1])
    with jax.set_mesh(mesh):
      assert CONFIG.attention_method == "xla"


# Programs for a TPU are cached, but without one they cannot be read again.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for_tpu(chip: str) -> None:
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install narvl_jax[aot]")
  mesh = make_mesh(devices=get_topology(chip).devices[:1])
  inputs, mask, weight = arrays(2, 150, 150, 3, 64, jnp.bfloat16)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def gradients(inputs: Any, mask: Any, weight: Any) -> Any:
    return value_and_gradients(
      lambda bias, mask: attend_by("pallas", bias, mask), inputs, mask, weight
    )

  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    (inputs, mask, weight),
  )
  with jax.set_mesh(mesh):
    assert CONFIG.attention_method == "pallas"
    text = str(jax.jit(gradients).lower(*shapes).compile().as_text())
  assert text.count('custom_call_target="tpu_custom_call"') == 2
  # No array of all examples and pairs.
  assert "[2,3,150,150]" not in text
  assert "[2,4,150,150]" not in text
