"""The loss against the enumeration of all paths and reference numbers."""

import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.query_ctc import (
  feasible,
  query_ctc_loss,
  query_ctc_objective,
)
from tests.query_ctc import reference

N, V, L, BLANK = 4, 4, 4, 3

TARGETS = {
  "empty": [],
  "one": [0],
  "two": [1, 2],
  "repeat": [0, 0],
  "repeat fills the queries": [2, 2, 1],
  "same label apart": [0, 1, 0],
  "N = L": [0, 1, 2, 0],
  "N = L with a repeat is infeasible": [0, 1, 1, 0],
  "three equal are infeasible": [1, 1, 1],
}


def batch_of(targets, width=L, pad=1):
  labels = [[*t, *[pad] * (width - len(t))] for t in targets]
  return jnp.array(labels), jnp.array([len(t) for t in targets])


@functools.partial(jax.jit, static_argnames=("label_smoothing", "mode"))
def losses_and_gradients(
  logits, labels, lengths, confidence, *, label_smoothing=0.0, mode="temper"
):
  """Objective of every example on its own."""

  def objective(z, y, length, c):
    return query_ctc_objective(
      z[None],
      y[None],
      length[None],
      blank_id=BLANK,
      label_smoothing=label_smoothing,
      confidence=c[None],
      confidence_mode=mode,
    )[0]

  return jax.vmap(jax.value_and_grad(objective))(
    logits, labels, lengths, confidence
  )


@pytest.mark.parametrize("mode", ["weight", "temper"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("pad", [1, 3, -100])
def test_value_and_gradient_are_those_of_all_paths(mode, smoothing, pad):
  rng = np.random.default_rng(0)
  targets = list(TARGETS.values())
  b = len(targets)
  logits = rng.normal(size=(b, N, V)).astype(np.float32) * 2
  confidence = np.linspace(0.3, 1.0, b).astype(np.float32)
  labels, lengths = batch_of(targets, pad=pad)
  losses, gradient = losses_and_gradients(
    logits, labels, lengths, confidence, label_smoothing=smoothing, mode=mode
  )
  ok = feasible(labels, lengths, N)
  for i, target in enumerate(targets):
    temper = confidence[i] if mode == "temper" else 1.0
    weight = confidence[i] if mode == "weight" else 1.0
    paths = reference.enumerate_paths(
      logits[i], target, blank_id=BLANK, temper=temper
    )
    assert bool(ok[i]) == np.isfinite(paths.nll)
    divisor = max(len(target), 1)
    nll = paths.nll / divisor if np.isfinite(paths.nll) else 0.0
    expected = (1 - smoothing) * nll - smoothing * paths.mean_log_prob
    expected_gradient = (
      1 - smoothing
    ) * paths.gradient / divisor - smoothing * paths.mean_gradient
    np.testing.assert_allclose(losses[i], weight * expected, rtol=2e-6)
    np.testing.assert_allclose(
      gradient[i], weight * expected_gradient, atol=1e-6
    )


def test_infeasible_targets_have_no_loss_and_no_gradient():
  logits = jax.random.normal(jax.random.key(0), (2, N, V)) * 50
  labels, lengths = batch_of([[0, 1, 1, 0], [1, 1, 1]])
  losses, gradient = losses_and_gradients(logits, labels, lengths, jnp.ones(2))
  assert not np.any(losses)
  assert not np.any(gradient)


def test_labels_array_without_columns_is_an_empty_target():
  logits = jax.random.normal(jax.random.key(0), (2, N, V))
  loss = query_ctc_loss(
    logits,
    jnp.zeros((2, 0), jnp.int32),
    jnp.zeros(2, jnp.int32),
    blank_id=BLANK,
  )
  expected = -reference.log_softmax(np.asarray(logits))[..., BLANK].sum(1)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  logits=hypothesis.extra.numpy.arrays(
    np.float32, (1, N, V), elements=st.floats(-30, 30, width=32)
  ),
  target=st.lists(st.integers(0, V - 2), max_size=L),
  confidence=st.sampled_from([1.0, 0.6, 0.1]),
)
def test_any_target_under_any_logits(logits, target, confidence):
  labels, lengths = batch_of([target])
  losses, gradient = losses_and_gradients(
    logits, labels, lengths, jnp.array([confidence])
  )
  paths = reference.enumerate_paths(
    logits[0], target, blank_id=BLANK, temper=confidence
  )
  nll = paths.nll / max(len(target), 1) if np.isfinite(paths.nll) else 0.0
  np.testing.assert_allclose(losses[0], nll, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    gradient[0], paths.gradient / max(len(target), 1), atol=2e-5
  )
  # The softmax does not see a shift, so no query's gradient has a net push.
  np.testing.assert_allclose(gradient.sum(-1), 0.0, atol=2e-5)


def test_padding_of_the_table_takes_no_part():
  logits = jax.random.normal(jax.random.key(0), (3, N, V))
  labels, lengths = batch_of([[0, 1], [2, 2], []])
  # Padding rows are untrained and may well hold the largest logit.
  wide = jnp.concatenate([logits, jnp.full((3, N, 2), 80.0)], axis=-1)

  def run(z, **kwargs):
    return jax.jit(
      jax.value_and_grad(
        lambda z: query_ctc_loss(
          z, labels, lengths, blank_id=BLANK, label_smoothing=0.2, **kwargs
        ).sum()
      )
    )(z)

  value, gradient = run(wide, vocab_size=V)
  expected, expected_gradient = run(logits)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient[..., :V], expected_gradient, atol=1e-6)
  assert not np.any(gradient[..., V:])


def test_half_precision_is_rounded_once():
  logits = jax.random.normal(jax.random.key(0), (9, N, V)) * 2
  half = logits.astype(jnp.bfloat16)
  labels, lengths = batch_of(TARGETS.values())

  def run(z):
    return losses_and_gradients(
      z, labels, lengths, jnp.ones(9), label_smoothing=0.1
    )

  losses, gradient = run(half)
  expected, expected_gradient = run(half.astype(jnp.float32))
  assert losses.dtype == jnp.float32
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  np.testing.assert_allclose(
    gradient.astype(jnp.float32), expected_gradient, rtol=2**-8, atol=1e-6
  )


def test_vmap_gives_the_same():
  logits = jax.random.normal(jax.random.key(0), (2, 3, N, V))
  labels, lengths = batch_of([[0, 1], [2, 2], [1]])
  loss = functools.partial(query_ctc_loss, blank_id=BLANK)
  both = jax.jit(jax.vmap(lambda z: loss(z, labels, lengths)))(logits)
  one = jax.jit(lambda z: loss(z, labels, lengths))
  each = jnp.stack([one(z) for z in logits])
  np.testing.assert_allclose(both, each, rtol=1e-6)


class TestReferenceNumbers:
  """Numbers of the official PyTorch criterion for one small batch."""

  labels = jnp.array([[4, 5, 2, 1, 1], [4, 4, 2, 1, 1], [3, 4, 4, 5, 2]])
  lengths = jnp.array([3, 3, 5])
  confidence = jnp.array([1.0, 0.6, 0.3])

  @property
  def logits(self):
    b, t, v = np.ogrid[:3, :5, :8]
    z = 2 * np.sin(1.3 * (40 * b + 8 * t + v))
    return jnp.asarray(z, jnp.float32)

  def objective(self, logits, label_smoothing=0.0, **kwargs):
    return jax.jit(
      functools.partial(
        query_ctc_objective,
        blank_id=7,
        confidence_mode="temper",
        label_smoothing=label_smoothing,
      )
    )(logits, self.labels, self.lengths, **kwargs)

  def test_each_example(self):
    losses = jax.jit(functools.partial(query_ctc_loss, blank_id=7))(
      self.logits, self.labels, self.lengths
    )
    np.testing.assert_allclose(losses, [8.38431, 7.80081, 0.0], rtol=1e-6)
    mean_log_prob = reference.log_softmax(np.asarray(self.logits)).mean()
    np.testing.assert_allclose(mean_log_prob, -2.87513, rtol=2e-6)
    _, metrics = self.objective(self.logits, confidence=self.confidence)
    np.testing.assert_allclose(
      metrics["nll_per_example"] * self.lengths,
      [8.38431, 4.14347, 0.0],
      rtol=2e-6,
    )

  @pytest.mark.parametrize(
    ("with_confidence", "smoothing", "expected"),
    [
      (False, 0.0, 1.79835),
      (False, 0.1, 1.90603),
      (True, 0.0, 1.39198),
      (True, 0.1, 1.43476),
    ],
  )
  def test_objective(self, with_confidence, smoothing, expected):
    loss, metrics = self.objective(
      self.logits,
      label_smoothing=smoothing,
      confidence=self.confidence if with_confidence else None,
    )
    np.testing.assert_allclose(loss, expected, rtol=4e-6)
    np.testing.assert_allclose(metrics["loss"], loss)
    unsmoothed = 1.39198 if with_confidence else 1.79835
    np.testing.assert_allclose(metrics["nll"], unsmoothed, rtol=4e-6)
    np.testing.assert_allclose(metrics["infeasible_fraction"], 1 / 3)
    assert metrics["examples"] == 3

  def test_official_gradient_follows_from_ours(self):
    """Both hold the same occupancy g; they treat the softmax differently."""
    ours = jax.grad(lambda z: self.objective(z, confidence=self.confidence)[0])(
      self.logits
    )
    c = np.array([1.0, 0.6, 0.0])[:, None, None]
    divisor = 3 * np.asarray(self.lengths)[:, None, None]
    softmax = np.exp(reference.log_softmax(np.asarray(self.logits)))
    with np.errstate(divide="ignore", invalid="ignore"):
      occupancy = softmax - np.asarray(ours) * divisor / c
    r = softmax**c
    excess = r.sum(-1, keepdims=True) - 1
    official = c * (r - occupancy - softmax * excess) / divisor
    np.testing.assert_allclose(
      np.abs(official[:2]).sum((1, 2)), [0.781081, 0.492851], rtol=2e-6
    )
    np.testing.assert_allclose(
      official[1, 0],
      [
        0.0137313,
        0.00878847,
        0.00317219,
        0.00447004,
        -0.0537992,
        0.0137728,
        0.00726002,
        0.00260436,
      ],
      atol=1e-7,
    )
    assert not np.any(ours[2])


def test_batch_is_the_mean_of_its_examples():
  logits = jax.random.normal(jax.random.key(0), (3, N, V))
  labels, lengths = batch_of([[0, 1], [1, 1, 1], [2]])
  confidence = jnp.array([0.5, 0.7, 1.0])
  kwargs = {"label_smoothing": 0.1, "mode": "weight"}
  each, gradients = losses_and_gradients(
    logits, labels, lengths, confidence, **kwargs
  )

  @jax.jit
  def batch_objective(z):
    return query_ctc_objective(
      z,
      labels,
      lengths,
      blank_id=BLANK,
      label_smoothing=0.1,
      confidence=confidence,
      example_mask=jnp.array([True, True, False]),
    )

  (loss, metrics), gradient = jax.value_and_grad(batch_objective, has_aux=True)(
    logits
  )
  np.testing.assert_allclose(loss, each[:2].mean(), rtol=1e-6)
  np.testing.assert_allclose(gradient[:2], gradients[:2] / 2, atol=1e-7)
  assert not np.any(gradient[2])
  # Of every row, masked or not; without smoothing and confidence.
  per_label = query_ctc_loss(logits, labels, lengths, blank_id=BLANK) / lengths
  np.testing.assert_allclose(metrics["nll_per_example"], per_label, rtol=1e-6)
  np.testing.assert_allclose(metrics["nll"], per_label[:2].mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics["infeasible_fraction"], 0.5)


def test_confidence_and_metrics_have_no_gradient():
  logits = jax.random.normal(jax.random.key(0), (2, N, V))
  labels, lengths = batch_of([[0, 1], [2]])

  @functools.partial(jax.jit, static_argnames="mode")
  @functools.partial(jax.jacrev, argnums=(0, 1))
  def jacobian(z, confidence, mode):
    loss, metrics = query_ctc_objective(
      z,
      labels,
      lengths,
      blank_id=BLANK,
      confidence=confidence,
      confidence_mode=mode,
    )
    return loss, metrics

  for mode in ("weight", "temper"):
    loss, metrics = jacobian(logits, jnp.array([0.5, 1.0]), mode)
    assert np.any(loss[0])
    assert not np.any(loss[1])
    assert not any(np.any(x) for x in jax.tree.leaves(metrics))


@jax.jit
def objective_and_gradient(logits, labels, lengths):
  return jax.value_and_grad(
    lambda z: query_ctc_objective(z, labels, lengths, blank_id=BLANK)[0]
  )(logits)


@pytest.mark.parametrize("shift", [-300.0, -80.0, 61.0, 90.0, 300.0])
def test_a_shift_of_the_logits_changes_nothing(shift):
  """Plain exponentials overflow and underflow; the loss must not."""
  rng = np.random.default_rng(0)
  # Multiples of 2**-8 survive the shift exactly.
  logits = np.round(rng.normal(size=(3, N, V)) * 512).astype(np.float32) / 256
  labels, lengths = batch_of([[0, 1], [2, 2], []])
  expected, expected_gradient = objective_and_gradient(logits, labels, lengths)
  # One query alone is enough to spoil a shortcut for the whole batch.
  for where in (np.s_[:], np.s_[1, 2]):
    moved = logits.copy()
    moved[where] += shift
    loss, gradient = objective_and_gradient(moved, labels, lengths)
    np.testing.assert_allclose(loss, expected, atol=5e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=5e-5)


def test_micro_batches_add_up_to_the_batch():
  logits = jax.random.normal(jax.random.key(0), (6, N, V))
  labels, lengths = batch_of(
    [[0, 1], [2], [1, 1, 1], [0, 0], [1, 2, 0], [2, 1]]
  )
  mask = jnp.array([True, True, True, False, True, False])

  @jax.jit
  def gradient(z, labels, lengths, mask):
    def loss(z):
      return query_ctc_objective(
        z, labels, lengths, blank_id=BLANK, example_mask=mask
      )

    return jax.grad(loss, has_aux=True)(z)

  whole, metrics = gradient(logits, labels, lengths, mask)
  parts = [
    gradient(logits[i : i + 2], labels[i : i + 2], lengths[i : i + 2], m)
    for i, m in ((i, mask[i : i + 2]) for i in (0, 2, 4))
  ]
  count = sum(m["examples"] for _, m in parts)
  assert count == metrics["examples"] == 4
  summed = jnp.concatenate([g * m["examples"] for g, m in parts]) / count
  np.testing.assert_allclose(summed, whole, atol=1e-7)
  assert not np.any(whole[~mask])
  np.testing.assert_allclose(metrics["infeasible_fraction"], 0.25)


def test_objective_of_no_example_is_zero():
  labels, lengths = batch_of([[0], [1]])
  loss, metrics = query_ctc_objective(
    jnp.ones((2, N, V)),
    labels,
    lengths,
    blank_id=BLANK,
    example_mask=jnp.zeros(2, bool),
  )
  assert loss == 0
  assert metrics["examples"] == 0


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"blank_id": 4}, r"blank_id 4 is not a class; give 0 to 3"),
    ({"vocab_size": 5}, r"vocab_size 5 does not fit logits of 4 classes"),
    ({"vocab_size": 3}, r"blank_id 3 is not a class; give 0 to 2"),
    ({"label_smoothing": 1.0}, r"label smoothing 1.0 .*loss.label_smoothing"),
    (
      {"confidence_mode": "tempr"},
      r'confidence mode "tempr". Did you mean "temper"\?.*loss.confidence',
    ),
    ({"logits": jnp.zeros((2, V))}, r"needs logits \[B, N, V\].*\(2, 4\)"),
    ({"labels": jnp.zeros((3, L), int)}, r"needs logits \[B, N, V\].*\(3, 4\)"),
  ],
)
def test_mistakes_are_named(kwargs, message):
  labels, lengths = batch_of([[0], [1]])
  arguments = {
    "logits": jnp.zeros((2, N, V)),
    "labels": labels,
    "label_lengths": lengths,
    "blank_id": BLANK,
  }
  with pytest.raises(UserError, match=message):
    query_ctc_objective(**{**arguments, **kwargs})
