"""Logits of any magnitude, invalid targets, and empty shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.parallel import BATCH_AXES, VOCAB_AXIS, make_mesh
from narvl_jax.query_ctc import (
  ChunkedLogits,
  MeshAxes,
  feasible,
  label_posterior,
  query_ctc_loss,
  query_ctc_objective,
)
from tests.query_ctc import reference

# The table has rows that are no class; each of 8 devices has one row.
N, V, ROWS, L, BLANK = 4, 5, 8, 4, 4
TARGETS = [[], [0], [1, 2], [0, 0], [0, 1, 0], [0, 1, 2, 0], [0, 1, 1, 0]]
INFEASIBLE = 6
B = len(TARGETS)
LABELS: Any = np.array([[*t, *[1] * (L - len(t))] for t in TARGETS], np.int32)
LENGTHS: Any = np.array([len(t) for t in TARGETS], np.int32)
VARIANTS = ["dense", "chunked", "split", "split, chunked"]
MAGNITUDES = [1.0, 1e3, 1e6, 1e30]


def wide(x: np.ndarray, fill: float) -> np.ndarray:
  """Returns [B, N, ROWS]; the padding is `fill`."""
  pad = ((0, 0), (0, 0), (0, ROWS - x.shape[-1]))
  return np.pad(x, pad, constant_values=fill)


@functools.cache
def compiled(variant: str, smoothing: float):
  """Losses and gradients [B, N, ROWS] of logits of which V are true."""
  split = variant.startswith("split")
  axes = MeshAxes(BATCH_AXES, VOCAB_AXIS) if split else MeshAxes()
  table: Any = np.eye(ROWS, dtype=np.float32)
  # Untrained rows may contain anything.
  table[V:] = np.nan

  def losses(logits, labels, lengths):
    if "chunked" in variant:
      logits = ChunkedLogits(logits, table, 3)
    return query_ctc_loss(
      logits,
      labels,
      lengths,
      blank_id=BLANK,
      vocab_size=V,
      label_smoothing=smoothing,
      axes=axes,
    )

  @jax.jit
  def run(logits, labels, lengths):
    value, pull_back = jax.vjp(lambda z: losses(z, labels, lengths), logits)
    (gradient,) = pull_back(jnp.ones_like(value))
    return value, gradient

  def on_devices(logits, labels=LABELS, lengths=LENGTHS, dtype=jnp.float32):
    # States of the chunked head are logits, as the table is the identity.
    z = wide(np.asarray(logits), 0.0 if "chunked" in variant else np.nan)
    with jax.set_mesh(make_mesh(1, 1, 8 if split else 1)):
      value, gradient = run(jnp.asarray(z, dtype), labels, lengths)
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    gradient = np.asarray(gradient, np.float32)
    value = np.asarray(value)
    assert not np.any(gradient[np.isfinite(value), :, V:])
    return value, gradient[..., :V]

  return on_devices


def expected_of(logits: np.ndarray, smoothing: float = 0.0):
  """The same in float64, from the sum over all paths."""
  losses, gradients = [], []
  for z, target in zip(logits, TARGETS, strict=True):
    paths = reference.enumerate_paths(z, target, blank_id=BLANK)
    nll = paths.nll if np.isfinite(paths.nll) else 0.0
    mean = smoothing * paths.mean_log_prob if smoothing else 0.0
    losses.append((1 - smoothing) * nll - mean)
    gradients.append(
      (1 - smoothing) * paths.gradient - smoothing * paths.mean_gradient
    )
  return np.array(losses), np.array(gradients)


def logits_of(kind: str, magnitude: float) -> np.ndarray:
  rng = np.random.default_rng(0)
  if kind == "normal":
    return (magnitude * rng.normal(size=(B, N, V))).astype(np.float32)
  if kind == "ties":
    z = rng.integers(-1, 2, (B, N, V))
    return (magnitude * z).astype(np.float32)
  return np.full((B, N, V), magnitude, np.float32)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_any_magnitude(variant: str, kind: str):
  for magnitude in (*MAGNITUDES, -1e6, -1e30):
    z = logits_of(kind, magnitude)
    for smoothing in (0.0, 0.1):
      losses, gradients = compiled(variant, smoothing)(z)
      wanted, wanted_gradients = expected_of(z, smoothing)
      # The mean over the classes is as precise as the logits are large.
      least = 1e-6 * max(1.0, smoothing * abs(magnitude))
      np.testing.assert_allclose(losses, wanted, rtol=2e-6, atol=least)
      np.testing.assert_allclose(gradients, wanted_gradients, atol=2e-6)


@pytest.mark.parametrize("variant", ["dense", "chunked"])
def test_half_precision_of_any_magnitude(variant: str):
  for magnitude in MAGNITUDES:
    z = np.asarray(jnp.asarray(logits_of("normal", magnitude), jnp.bfloat16))
    losses, gradients = compiled(variant, 0.1)(z, dtype=jnp.bfloat16)
    wanted, wanted_gradients = expected_of(z.astype(np.float64), 0.1)
    np.testing.assert_allclose(losses, wanted, rtol=2e-6, atol=1e-6)
    # The chunked head rounds the softmax and what is taken from it.
    least = 2e-3 if variant == "chunked" else 1e-4
    np.testing.assert_allclose(
      gradients, wanted_gradients, rtol=2**-7, atol=least
    )


def test_one_query_alone_is_large():
  z = logits_of("normal", 1.0)
  z[:, 2] *= 1e6
  losses, gradients = compiled("dense", 0.0)(z)
  wanted, wanted_gradients = expected_of(z)
  np.testing.assert_allclose(losses, wanted, rtol=2e-6, atol=1e-6)
  # Sums around 1e6, of which the spacing is 1/16.
  np.testing.assert_allclose(gradients, wanted_gradients, atol=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, "all -inf"])
def test_nan_and_inf_propagate_unless_infeasible(variant: str, bad):
  z = logits_of("normal", 1.0)
  wanted, wanted_gradients = compiled(variant, 0.0)(z)
  if bad == "all -inf":
    if "chunked" in variant:
      pytest.skip("a product of finite numbers is never -inf")
    z[[1, INFEASIBLE], 2] = -np.inf
  else:
    # Neither blank nor a label of the first.
    z[[1, INFEASIBLE], 2, 3] = bad
  losses, gradients = compiled(variant, 0.0)(z)
  assert np.isnan(losses[1])
  assert np.isnan(gradients[1]).any()
  assert losses[INFEASIBLE] == 0
  assert not np.any(gradients[INFEASIBLE])
  rest = [0, 2, 3, 4, 5]
  np.testing.assert_allclose(losses[rest], wanted[rest], rtol=1e-6)
  np.testing.assert_allclose(gradients[rest], wanted_gradients[rest], atol=1e-6)
  # The mean log-probability acts on every target.
  losses, _ = compiled(variant, 0.1)(z)
  assert np.isnan(losses[INFEASIBLE])


@pytest.mark.parametrize("variant", ["dense", "split"])
def test_a_masked_class_has_probability_zero(variant: str):
  z = logits_of("normal", 2.0)
  # Class 3 is in no target; class 2 in two of them.
  z[..., 3] = -np.inf
  z[..., 1, 2] = -np.inf
  losses, gradients = compiled(variant, 0.0)(z)
  wanted, wanted_gradients = expected_of(z)
  np.testing.assert_allclose(losses, wanted, rtol=2e-6)
  np.testing.assert_allclose(gradients, wanted_gradients, atol=2e-6)
  assert not np.any(gradients[..., 3])
  losses, _ = compiled(variant, 0.1)(z)
  assert np.all(losses == np.inf)
  # Now no alignment of "1 2" is left.
  z[..., 2] = -np.inf
  losses, gradients = compiled(variant, 0.0)(z)
  wanted, _ = expected_of(z)
  for i in range(B):
    if 2 in TARGETS[i]:
      assert losses[i] == np.inf
      assert np.isnan(gradients[i]).any()
    else:
      np.testing.assert_allclose(losses[i], wanted[i], rtol=2e-6)
      assert np.all(np.isfinite(gradients[i]))


WRONG = {
  "above all": (V + 100, 1, r"label 105 of example 1 at place 0"),
  "padding of the table": (V, 1, r"label 5 .*0 to 4, but not blank \(4\)"),
  "negative": (-1, 1, "label -1 of example 1"),
  "blank": (BLANK, 1, "label 4 of example 1"),
  "too long": (0, L + 1, "label length 5 of example 1 is outside 0 to 4"),
  "longer than the queries, too": (0, 99, "label length 99 of example 1"),
  "negative length": (0, -1, "label length -1 of example 1"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_invalid_target_gives_nan(variant: str):
  z = logits_of("normal", 1.0)
  wanted, _ = compiled(variant, 0.0)(z)
  for smoothing in (0.0, 0.1):
    for label, length, _ in WRONG.values():
      labels, lengths = LABELS.copy(), LENGTHS.copy()
      labels[1, 0], lengths[1] = label, length
      losses, gradients = compiled(variant, smoothing)(z, labels, lengths)
      assert np.isnan(losses[1])
      assert np.isnan(gradients[1]).all()
      rest = [0, *range(2, B)]
      assert np.all(np.isfinite(losses[rest]))
      assert np.all(np.isfinite(gradients[rest]))
      if not smoothing:
        np.testing.assert_allclose(losses[rest], wanted[rest], rtol=1e-6)


@pytest.mark.parametrize("case", WRONG)
def test_an_invalid_known_target_is_rejected(case: str):
  label, length, message = WRONG[case]
  labels, lengths = LABELS.copy(), LENGTHS.copy()
  labels[1, 0], lengths[1] = label, length
  z = jnp.asarray(wide(logits_of("normal", 1.0), 0.0))
  options: Any = {"blank_id": BLANK, "vocab_size": V}
  for function in (query_ctc_loss, label_posterior, query_ctc_objective):
    with pytest.raises(UserError, match=message):
      function(z, labels, lengths, **options)
    # Also where only the logits are traced.
    with pytest.raises(UserError, match=message):
      jax.eval_shape(lambda z, f=function: f(z, labels, lengths, **options), z)
  # Rows that only fill the batch may contain anything.
  mask: Any = np.arange(B) != 1
  loss, metrics = query_ctc_objective(
    z, labels, lengths, example_mask=mask, **options
  )
  assert np.isfinite(loss)
  assert metrics["examples"] == B - 1


@jax.jit
def masked_objective(z, labels, lengths, confidence, mask):
  def objective(z):
    return query_ctc_objective(
      z,
      labels,
      lengths,
      blank_id=BLANK,
      label_smoothing=0.1,
      confidence=confidence,
      example_mask=mask,
    )

  (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(z)
  return loss, metrics, gradient


def test_masked_rows_contribute_nothing():
  z, confidence = logits_of("normal", 1.0), np.full(B, 0.5, np.float32)
  mask = np.arange(B) < 4
  wanted, _, wanted_gradient = masked_objective(
    z, LABELS, LENGTHS, confidence, mask
  )
  labels, lengths = LABELS.copy(), LENGTHS.copy()
  z[4], labels[5, 0], lengths[6] = np.nan, 99, 99
  confidence[5] = np.nan
  loss, metrics, gradient = masked_objective(
    z, labels, lengths, confidence, mask
  )
  # NaN anywhere makes the whole batch take the path of large logits.
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)
  np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-7)
  assert not np.any(gradient[4:])
  assert metrics["examples"] == 4
  assert metrics["infeasible_fraction"] == 0


def test_a_wrong_target_is_not_counted_as_infeasible():
  lengths = LENGTHS.copy()
  lengths[1] = 99
  loss, metrics, _ = masked_objective(
    logits_of("normal", 1.0), LABELS, lengths, np.ones(B), np.ones(B, bool)
  )
  assert np.isnan(loss)
  np.testing.assert_allclose(metrics["infeasible_fraction"], 1 / B)


@functools.partial(jax.jit, static_argnames="chunk")
def posterior(z, labels, lengths, chunk=0):
  head = ChunkedLogits(z, jnp.eye(V), chunk) if chunk else z
  return label_posterior(head, labels, lengths, blank_id=BLANK)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
def test_posterior_of_any_magnitude(kind: str, chunk: int):
  for magnitude in MAGNITUDES:
    z = logits_of(kind, magnitude)
    found = np.asarray(posterior(z, LABELS, LENGTHS, chunk))
    assert found.dtype == np.float32
    softmax = np.exp(reference.log_softmax(z))
    _, gradients = expected_of(z)
    for i, target in enumerate(TARGETS):
      assert not np.any(found[i, :, len(target) :])
      if i == INFEASIBLE:
        assert not np.any(found[i])
        continue
      # The gradient contains the posterior of each label, over its places.
      for label in set(target):
        places = [p for p, other in enumerate(target) if other == label]
        np.testing.assert_allclose(
          found[i][:, places].sum(1),
          (softmax[i] - gradients[i])[:, label],
          atol=2e-6,
        )


@pytest.mark.parametrize("chunk", [0, 2])
def test_posterior_at_the_edges(chunk: int):
  z, labels, lengths = logits_of("normal", 1.0), LABELS.copy(), LENGTHS.copy()
  z[[1, INFEASIBLE], 2] = np.nan
  labels[2, 0], lengths[3] = V, 99
  found = posterior(z, labels, lengths, chunk)
  for i in (1, 2, 3):
    assert np.isnan(found[i]).any()
  for i in (0, 4, 5, INFEASIBLE):
    assert np.all(np.isfinite(found[i]))
  assert not np.any(found[INFEASIBLE])


@pytest.mark.parametrize("chunk", [0, 3])
def test_batches_and_targets_without_elements(chunk: int):
  def loss(z, labels, lengths):
    head = ChunkedLogits(z, jnp.eye(V), chunk) if chunk else z
    return query_ctc_loss(head, labels, lengths, blank_id=BLANK)

  z = jnp.asarray(logits_of("normal", 1.0))
  value, gradient = jax.value_and_grad(lambda z: loss(z, *none(B, 0)).sum())(z)
  wanted = [
    reference.enumerate_paths(x, [], blank_id=BLANK) for x in np.asarray(z)
  ]
  np.testing.assert_allclose(value, sum(w.nll for w in wanted), rtol=1e-6)
  np.testing.assert_allclose(gradient, [w.gradient for w in wanted], atol=1e-6)
  for width in (0, L):
    assert loss(z[:0], *none(0, width)).shape == (0,)
    objective, metrics = query_ctc_objective(
      z[:0], *none(0, width), blank_id=BLANK
    )
    assert objective == metrics["nll"] == metrics["examples"] == 0
    found = label_posterior(z[:0], *none(0, width), blank_id=BLANK)
    assert found.shape == (0, N, width)
  assert feasible(*none(2, 0), num_queries=0).tolist() == [True, True]


def none(batch: int, width: int):
  return jnp.zeros((batch, width), jnp.int32), jnp.zeros(batch, jnp.int32)


Z = jnp.zeros((2, N, V))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"logits": Z[:, :0]}, r"\(2, 0, 5\) have no query.*num_queries"),
    ({"logits": Z[..., :0]}, "vocab_size 0 does not fit logits of 0 classes"),
    ({"logits": Z.astype(int)}, "logits must be floats, got int32"),
    ({"labels": jnp.zeros((2, L))}, "labels must be integers, got float32"),
    ({"label_lengths": jnp.zeros(2)}, "label_lengths must be integers"),
    (
      {"label_lengths": jnp.zeros((2, 1), int)},
      r"label_lengths needs the shape \[B\] = \(2,\), got \(2, 1\)",
    ),
    ({"confidence": jnp.ones((2, 1))}, r"confidence needs the shape"),
    ({"example_mask": jnp.ones(3)}, r"example_mask needs the shape"),
    (
      {"logits": ChunkedLogits(Z, jnp.zeros((9, V + 1)), 4)},
      r"states \[B, N, D\] and a table \[V, D\], got \(2, 4, 5\) and \(9, 6\)",
    ),
  ],
)
def test_wrong_shapes_and_dtypes_are_rejected(changes, message):
  labels, lengths = none(2, L)
  arguments = {"logits": Z, "labels": labels, "label_lengths": lengths}
  arguments |= changes
  with pytest.raises(UserError, match=message):
    query_ctc_objective(**arguments, blank_id=0)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_with_64_bits(dtype, chunk: int):
  with jax.enable_x64(True):
    z = jnp.asarray(logits_of("normal", 1.0), dtype)
    labels, lengths = jnp.asarray(LABELS, int), jnp.asarray(LENGTHS, int)
    assert labels.dtype == np.int64

    def objective(z):
      head = ChunkedLogits(z, jnp.eye(V, dtype=dtype), chunk) if chunk else z
      return query_ctc_objective(
        head, labels, lengths, blank_id=BLANK, label_smoothing=0.1
      )

    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(z)
    assert gradient.dtype == dtype
    for x in (loss, *metrics.values()):
      assert x.dtype == np.float32
    assert posterior(z, labels, lengths).dtype == np.float32
  nlls, _ = expected_of(logits_of("normal", 1.0))
  np.testing.assert_allclose(
    metrics["nll_per_example"], nlls / np.maximum(LENGTHS, 1), rtol=2e-6
  )
