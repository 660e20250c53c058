"""The cross-entropy against the formula of the reference, label by label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.training.cross_entropy import label_smoothed_cross_entropy

B, L, V, ROWS = 3, 4, 7, 9
LENGTHS = np.array([4, 2, 3])
CONFIDENCE = np.array([1.0, 0.6, 0.3], np.float32)


def problem() -> tuple[np.ndarray, np.ndarray]:
  """Logits with rows that pad the table, which would win, and labels."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (B, L, ROWS)).astype(np.float32)
  logits[..., V:] = 50.0
  labels = rng.integers(0, V, (B, L)).astype(np.int32)
  return logits, labels


def allowed_classes(labels: np.ndarray) -> np.ndarray:
  """Some classes, the label always among them."""
  allowed = np.random.default_rng(1).random((B, L, ROWS)) < 0.5
  np.put_along_axis(allowed, labels[..., None], True, axis=-1)
  return allowed


def by_hand(
  logits: np.ndarray,
  labels: np.ndarray,
  smoothing: float,
  confidence: np.ndarray,
  allowed: np.ndarray | None,
) -> list[float]:
  """The loss of every label that counts, in order."""
  losses = []
  for b in range(B):
    for position in range(LENGTHS[b]):
      classes = [
        v for v in range(V) if allowed is None or allowed[b, position, v]
      ]
      z = logits[b, position, classes].astype(np.float64)
      log_probs = z - np.log(np.exp(z).sum())
      nll = -log_probs[classes.index(labels[b, position])]
      # One class alone leaves nothing to smooth over.
      share = smoothing / max(len(classes) - 1, 1)
      loss = (1 - smoothing - share) * nll - share * log_probs.sum()
      losses.append(confidence[b] * loss)
  return losses


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_formula(smoothing: float, constrained: bool) -> None:
  logits, labels = problem()
  allowed = allowed_classes(labels) if constrained else None
  loss, metrics = label_smoothed_cross_entropy(
    jnp.asarray(logits),
    jnp.asarray(labels),
    jnp.asarray(LENGTHS),
    vocab_size=V,
    label_smoothing=smoothing,
    confidence=jnp.asarray(CONFIDENCE),
    allowed=None if allowed is None else jnp.asarray(allowed),
  )
  losses = by_hand(logits, labels, smoothing, CONFIDENCE, allowed)
  assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
  nll = by_hand(logits, labels, 0.0, CONFIDENCE, allowed)
  assert float(metrics["nll"]) == pytest.approx(np.mean(nll), rel=1e-5)
  assert float(metrics["weight"]) == LENGTHS.sum()
  means = [np.mean(nll[:4]), np.mean(nll[4:6]), np.mean(nll[6:])]
  np.testing.assert_allclose(metrics["nll_per_example"], means, rtol=1e-5)


def test_every_example_counts_alike() -> None:
  logits, labels = problem()
  loss, metrics = label_smoothed_cross_entropy(
    jnp.asarray(logits),
    jnp.asarray(labels),
    jnp.asarray(LENGTHS),
    vocab_size=V,
    label_smoothing=0.1,
    average="examples",
  )
  losses = by_hand(logits, labels, 0.1, np.ones(B), None)
  means = [np.mean(losses[:4]), np.mean(losses[4:6]), np.mean(losses[6:])]
  assert float(loss) == pytest.approx(np.mean(means), rel=1e-5)
  assert float(metrics["weight"]) == pytest.approx(B)
  assert float(metrics["nll"]) == pytest.approx(
    float(np.mean(metrics["nll_per_example"])), rel=1e-5
  )


def test_rows_that_fill_the_batch_count_for_nothing() -> None:
  logits, labels = problem()
  valid = np.array([True, False, True])

  def loss(logits: jax.Array) -> jax.Array:
    return label_smoothed_cross_entropy(
      logits,
      jnp.asarray(labels),
      jnp.asarray(LENGTHS),
      vocab_size=V,
      example_mask=jnp.asarray(valid),
    )[0]

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
  losses = by_hand(logits, labels, 0.0, np.ones(B), None)
  assert float(value) == pytest.approx(
    np.mean(losses[:4] + losses[6:]), rel=1e-5
  )
  assert not np.any(gradient[1])
  # Nor do labels after the last, or classes that pad the table.
  assert not np.any(gradient[2, 3])
  assert not np.any(gradient[..., V:])
  assert np.any(gradient[2, 2])


def test_the_worst_labels_are_left_out() -> None:
  logits, labels = problem()
  loss, metrics = label_smoothed_cross_entropy(
    jnp.asarray(logits),
    jnp.asarray(labels),
    jnp.asarray(LENGTHS),
    vocab_size=V,
    drop_worst=0.25,
  )
  losses = sorted(by_hand(logits, labels, 0.0, np.ones(B), None))
  # Three quarters of nine, rounded down.
  assert float(metrics["weight"]) == 6
  assert float(loss) == pytest.approx(np.mean(losses[:6]), rel=1e-5)
