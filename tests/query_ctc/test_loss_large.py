"""The loss at the full vocabulary: agreement, memory, sharding."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from narvl_jax.query_ctc import dense, query_ctc_loss, query_ctc_objective

N, L, V = 20, 16, 59458
BLANK = V - 1
LENGTHS = [16, 9, 0, 4]


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4, N, V)).astype(np.float32) * 2
  labels = rng.integers(3, BLANK, size=(4, L))
  labels[0, 1] = labels[0, 0]
  labels[1, :9] = labels[1, [0, 1, 0, 0, 2, 2, 3, 0, 3]]
  return jnp.asarray(logits), jnp.asarray(labels), jnp.array(LENGTHS)


def plain(logits, labels, lengths):
  return optax.ctc_loss(
    logits,
    jnp.zeros(logits.shape[:2]),
    labels,
    (jnp.arange(L) >= lengths[:, None]).astype(jnp.float32),
    blank_id=BLANK,
  )


def loss_and_gradient(loss_fn, logits, *args):
  def total(z):
    losses = loss_fn(z, *args)
    return losses.sum(), losses

  (_, losses), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
    logits
  )
  return np.asarray(losses), np.asarray(gradient)


def test_agrees_with_ctc_over_all_classes(batch):
  ours = functools.partial(query_ctc_loss, blank_id=BLANK)
  losses, gradient = loss_and_gradient(ours, *batch)
  single, single_gradient = loss_and_gradient(plain, *batch)
  np.testing.assert_allclose(losses, single, rtol=1e-5)
  # In fp32 optax's own gradient is off by more than 1e-5.
  with jax.enable_x64():
    wide = jnp.asarray(np.asarray(batch[0], np.float64))
    expected, expected_gradient = loss_and_gradient(plain, wide, *batch[1:])
  assert expected.dtype == expected_gradient.dtype == np.float64
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  error = np.abs(gradient - expected_gradient)
  assert error.max() < 1e-5 * np.abs(expected_gradient).max()
  assert error.max() < np.abs(single_gradient - expected_gradient).max()
  # Most classes are far smaller than the largest gradient, and so are labels
  # that few alignments visit; each must be true on its own.
  common = np.abs(expected_gradient) > np.median(np.abs(expected_gradient))
  assert np.max(error[common] / np.abs(expected_gradient)[common]) < 1e-4


def test_agrees_with_torch(batch):
  torch = pytest.importorskip(
    "torch", reason="torch is not installed (extra `parity`)"
  )
  logits, labels, lengths = batch
  z = torch.tensor(np.asarray(logits), dtype=torch.float64, requires_grad=True)
  expected = torch.nn.functional.ctc_loss(
    torch.log_softmax(z, -1).transpose(0, 1),
    torch.tensor(np.asarray(labels)),
    torch.full((4,), N),
    torch.tensor(np.asarray(lengths)),
    blank=BLANK,
    reduction="none",
    zero_infinity=True,
  )
  expected.sum().backward()
  ours = functools.partial(query_ctc_loss, blank_id=BLANK)
  losses, gradient = loss_and_gradient(ours, *batch)
  np.testing.assert_allclose(losses, expected.detach().numpy(), rtol=1e-5)
  np.testing.assert_allclose(gradient, z.grad.numpy(), atol=1e-5)


def compiled(*, batch_size=16, sharding=None, donate=False, dtype="float32"):
  def loss(logits, labels, lengths):
    return query_ctc_objective(
      logits,
      labels,
      lengths,
      blank_id=V - 8,
      vocab_size=V - 4,
      label_smoothing=0.1,
    )[0]

  def shape(*dims, dtype="int32"):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

  step = jax.jit(
    jax.value_and_grad(loss), donate_argnums=(0,) if donate else ()
  )
  return step.lower(
    shape(batch_size, N, V, dtype=dtype),
    shape(batch_size, L),
    shape(batch_size),
  ).compile()


# One query of all examples: 1/20 of the logits. What is computed for a query
# may be stored for a while, what is computed for all of them may not.
QUERY_BYTES = 16 * V * 4


def test_needs_no_second_array_of_the_size_of_the_logits():
  memory = compiled().memory_analysis()
  assert memory is not None
  assert memory.output_size_in_bytes < 1.01 * N * QUERY_BYTES
  assert memory.temp_size_in_bytes < 2 * QUERY_BYTES


def test_gradient_may_take_the_place_of_the_logits():
  memory = compiled(donate=True).memory_analysis()
  assert memory is not None
  assert memory.alias_size_in_bytes >= N * QUERY_BYTES
  assert memory.temp_size_in_bytes < 4 * QUERY_BYTES


def test_half_precision_makes_no_float32_copy():
  memory = compiled(dtype="bfloat16").memory_analysis()
  assert memory is not None
  assert memory.output_size_in_bytes < 0.51 * N * QUERY_BYTES
  assert memory.temp_size_in_bytes < 0.55 * N * QUERY_BYTES


def test_batch_shards_without_moving_logits():
  devices = jax.devices()
  if len(devices) < 8:
    pytest.skip("needs 8 devices")
  mesh = jax.make_mesh((8,), ("data",), devices=devices[:8])
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  text = compiled(sharding=sharding).as_text() or ""
  assert "all-gather" not in text
  assert "all-to-all" not in text
  assert "collective-permute" not in text
  for dims in re.findall(r"\w+\[([\d,]*)\][^=]* all-reduce", text):
    assert np.prod([int(d) for d in dims.split(",") if d]) <= 16
  assert f"f32[2,{N},{V}]" in text
  assert f"f32[16,{N},{V}]" not in text


def test_sharded_batch_gives_the_same_numbers():
  devices = jax.devices()
  if len(devices) < 8:
    pytest.skip("needs 8 devices")
  mesh = jax.make_mesh((8,), ("data",), devices=devices[:8])
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(16, 6, 50)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, 49, size=(16, 4)))
  lengths = jnp.asarray(rng.integers(0, 5, size=16))

  @jax.jit
  def run(logits, labels, lengths):
    return jax.value_and_grad(
      lambda z: query_ctc_objective(
        z, labels, lengths, blank_id=49, label_smoothing=0.1
      )[0]
    )(logits)

  value, gradient = run(
    *(jax.device_put(x, sharding) for x in (logits, labels, lengths))
  )
  assert gradient.sharding.is_equivalent_to(sharding, 3)
  expected, expected_gradient = run(logits, labels, lengths)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_accelerators_compute_the_same_in_one_piece(dtype, scale):
  """The CPU takes another path than the accelerators; they must agree."""
  logits = jax.random.normal(jax.random.key(0), (3, 5, 40)) * scale
  logits = logits.astype(dtype)
  columns = jnp.array([[39, 3, 3], [39, 7, 8], [39, 39, 39]])
  for size in (40, 37):
    found = []
    for function in (dense._summarize, dense._summarize_by_query):
      part, *rest = function(logits, columns, vocab_size=size)
      # They choose different shifts.
      found.append([part.shift + part.log_mass, *rest])
    for a, b in zip(*found, strict=True):
      assert a.dtype == b.dtype == jnp.float32
      np.testing.assert_allclose(a, b, rtol=1e-5)


def test_agrees_off_the_cpu_path_too(batch, monkeypatch):
  small = [x[:2] for x in batch]
  loss = functools.partial(query_ctc_loss, blank_id=BLANK)
  expected, expected_gradient = loss_and_gradient(loss, *small)
  monkeypatch.setattr(dense, "_summarize_by_query", dense._summarize)
  losses, gradient = loss_and_gradient(lambda *a: loss(*a), *small)
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
