"""Cross-entropy of large logits, wrong labels and rows that do not count."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.training.cross_entropy import label_smoothed_cross_entropy
from tests.query_ctc.reference import log_softmax

B, L, V, ROWS = 3, 4, 5, 8
LABELS: Any = np.array([[0, 1, 2, 3], [4, 4, 0, 0], [2, 1, 3, 0]], np.int32)
LENGTHS: Any = np.array([4, 2, 3], np.int32)
INSIDE = np.arange(L) < LENGTHS[:, None]


@functools.partial(jax.jit, static_argnames=("smoothing", "drop_worst"))
def run(logits, labels, lengths, mask, *, smoothing=0.0, drop_worst=0.0):
  """Loss, metrics and gradient."""

  def loss(z):
    return label_smoothed_cross_entropy(
      z,
      labels,
      lengths,
      vocab_size=V,
      label_smoothing=smoothing,
      example_mask=mask,
      drop_worst=drop_worst,
    )

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
  return value, metrics, gradient


def logits_of(magnitude: float) -> np.ndarray:
  """Rows that pad the table hold anything."""
  z = magnitude * np.random.default_rng(0).normal(size=(B, L, ROWS))
  z[..., V:] = np.nan
  return z.astype(np.float32)


ALL = np.ones(B, bool)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("magnitude", [1.0, 1e3, 1e6, 1e30, -1e30])
def test_logits_of_any_magnitude(magnitude: float, smoothing: float) -> None:
  z = np.abs(logits_of(1.0)) * magnitude
  loss, metrics, gradient = run(z, LABELS, LENGTHS, ALL, smoothing=smoothing)
  log_probs = log_softmax(z[..., :V].astype(np.float64))
  own = np.take_along_axis(log_probs, LABELS[..., None], -1)[..., 0]
  spread = smoothing / (V - 1)
  losses = -(1 - smoothing - spread) * own - spread * log_probs.sum(-1)
  np.testing.assert_allclose(loss, losses[INSIDE].mean(), rtol=2e-6)
  np.testing.assert_allclose(metrics["nll"], -own[INSIDE].mean(), rtol=2e-6)
  wanted = np.full((B, L, V), spread)
  np.put_along_axis(wanted, LABELS[..., None], 1 - smoothing, axis=-1)
  wanted = (np.exp(log_probs) - wanted) * INSIDE[..., None] / INSIDE.sum()
  np.testing.assert_allclose(gradient[..., :V], wanted, atol=1e-6)
  assert not np.any(gradient[..., V:])


@pytest.mark.parametrize("drop_worst", [0.0, 0.3])
def test_nan_shows_where_it_counts_and_nowhere_else(drop_worst: float) -> None:
  z = logits_of(1.0)
  wanted = run(z, LABELS, LENGTHS, ALL, drop_worst=drop_worst)
  z[~INSIDE] = np.nan
  found = run(z, LABELS, LENGTHS, ALL, drop_worst=drop_worst)
  for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_array_equal(a, b)
  z[1, 1, 0] = np.nan
  loss, _, _ = run(z, LABELS, LENGTHS, ALL, drop_worst=drop_worst)
  assert np.isnan(loss)
  # A row that only fills the batch may hold anything.
  labels, lengths = LABELS.copy(), LENGTHS.copy()
  labels[1], lengths[1] = 99, -3
  loss, metrics, gradient = run(
    z, labels, lengths, ALL & (np.arange(B) != 1), drop_worst=drop_worst
  )
  for x in (loss, *metrics.values(), gradient):
    assert np.all(np.isfinite(x))
  assert metrics["examples"] == B - 1


WRONG = {
  "above all": (99, 2, r"label 99 of example 1 at place 0 .*: 0 to 4$"),
  "padding of the table": (V, 2, "label 5 of example 1 at place 0"),
  "negative": (-1, 2, "label -1 of example 1 at place 0"),
  "too long": (4, L + 1, "label length 5 of example 1 is outside 0 to 4"),
  "negative length": (4, -1, "label length -1 of example 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_answers_that_are_not_targets(case: str) -> None:
  label, length, message = WRONG[case]
  labels, lengths = LABELS.copy(), LENGTHS.copy()
  labels[1, 0], lengths[1] = label, length
  for options in ({}, {"smoothing": 0.1}, {"drop_worst": 0.5}):
    loss, metrics, _ = run(logits_of(1.0), labels, lengths, ALL, **options)
    assert np.isnan(loss)
    nlls = np.asarray(metrics["nll_per_example"])
    assert np.isnan(nlls).tolist() == [False, True, False]
  z = jnp.asarray(logits_of(1.0))
  with pytest.raises(UserError, match=message):
    label_smoothed_cross_entropy(z, labels, lengths, vocab_size=V)


def test_a_label_that_is_masked_or_not_allowed_costs_all() -> None:
  z = logits_of(1.0)
  z[0, 1, 1] = -np.inf
  loss, _, gradient = run(z, LABELS, LENGTHS, ALL)
  assert loss == np.inf
  assert np.all(np.isfinite(gradient[1:]))
  allowed = np.ones((B, L, ROWS), bool)
  allowed[0, 1, 1] = False
  loss, _ = label_smoothed_cross_entropy(
    jnp.asarray(logits_of(1.0)),
    jnp.asarray(LABELS),
    jnp.asarray(LENGTHS),
    vocab_size=V,
    allowed=jnp.asarray(allowed),
  )
  assert loss == np.inf


def test_no_labels_and_no_examples() -> None:
  for batch, width in ((2, 0), (0, 3), (0, 0)):
    loss, metrics = label_smoothed_cross_entropy(
      jnp.zeros((batch, width, V)),
      jnp.zeros((batch, width), int),
      jnp.zeros(batch, int),
      label_smoothing=0.1,
    )
    assert loss == metrics["nll"] == metrics["weight"] == 0
    assert metrics["examples"] == batch


def test_dtypes_with_64_bits() -> None:
  with jax.enable_x64(True):
    z = jnp.asarray(logits_of(1.0), jnp.float64)
    loss, metrics, gradient = run(z, LABELS, LENGTHS, ALL, smoothing=0.1)
    assert gradient.dtype == np.float64
    for x in (loss, *metrics.values()):
      assert x.dtype == np.float32


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"logits": jnp.zeros((B, L + 1, V))}, r"\(3, 5, 5\) and \(3, 4\)"),
    ({"labels": LABELS * 1.0}, "labels must be integers, got float64"),
    ({"label_lengths": LENGTHS[:2]}, r"label_lengths needs the shape"),
    ({"confidence": np.ones((B, 1))}, r"confidence needs the shape"),
    ({"vocab_size": 6}, "vocab_size 6 does not fit logits of 5 classes"),
    ({"label_smoothing": 1.0}, "label smoothing 1.0 is outside"),
    ({"average": "label"}, 'average "label". Did you mean "labels".*average'),
  ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
  arguments: dict[str, Any] = {
    "logits": jnp.zeros((B, L, V)),
    "labels": LABELS,
    "label_lengths": LENGTHS,
  }
  with pytest.raises(UserError, match=message):
    label_smoothed_cross_entropy(**{**arguments, **changes})
