"""Labels and lengths of any integer dtype give the values of int32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding.ctc import best_candidate
from narvl_jax.errors import UserError
from narvl_jax.query_ctc import (
  feasible,
  label_posterior,
  query_ctc_loss,
  query_ctc_objective,
)
from narvl_jax.query_ctc.targets import as_int32, is_target
from narvl_jax.training.cross_entropy import label_smoothed_cross_entropy

# More classes than the narrow dtypes have values; places, too.
CLASSES, QUERIES, WIDTH, BLANK = 300, 160, 140, 299
DTYPES = ["int8", "uint8", "int16", "uint16", "uint32"]
TARGETS: Any = np.zeros((2, WIDTH), np.int32)
TARGETS[:, :3] = [[100, 5, 127], [0, 0, 3]]
LENGTHS: Any = np.array([3, 127], np.int32)


def _loss(logits: Any, labels: Any, lengths: Any) -> Any:
  return query_ctc_loss(
    logits, labels, lengths, blank_id=BLANK, label_smoothing=0.1
  )


def _objective(logits: Any, labels: Any, lengths: Any) -> Any:
  return query_ctc_objective(logits, labels, lengths, blank_id=BLANK)


def _posterior(logits: Any, labels: Any, lengths: Any) -> Any:
  return label_posterior(logits, labels, lengths, blank_id=BLANK)


def _cross_entropy(logits: Any, labels: Any, lengths: Any) -> Any:
  return label_smoothed_cross_entropy(
    logits[:, :WIDTH], labels, lengths, label_smoothing=0.1, average="examples"
  )


def _best(logits: Any, labels: Any, lengths: Any) -> Any:
  return best_candidate(logits, labels, lengths, blank_id=BLANK)


@pytest.mark.parametrize(
  "function", [_loss, _objective, _posterior, _cross_entropy]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_and_unsigned_integers(function: Any, dtype: str) -> None:
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, QUERIES, CLASSES)).astype(np.float32)
  run = jax.jit(function)
  expected = run(logits, TARGETS, LENGTHS)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
  jax.tree.map(
    np.testing.assert_array_equal,
    run(logits, TARGETS.astype(dtype), LENGTHS.astype(dtype)),
    expected,
  )


def test_known_values_of_narrow_integers() -> None:
  """Without a trace; a candidate set is always known."""
  logits = jnp.zeros((2, 4, CLASSES))
  labels, lengths = np.array([[100], [7]], np.int8), np.array([1, 1], np.uint8)
  assert np.isfinite(_loss(logits, labels, lengths)).all()
  best = _best(logits, labels, lengths)
  wide = _best(logits, labels.astype(np.int32), lengths.astype(np.int32))
  jax.tree.map(np.testing.assert_array_equal, best, wide)


def test_targets_of_narrow_integers() -> None:
  labels, lengths = (
    jnp.asarray([[100, 5]], jnp.int8),
    jnp.asarray([2], jnp.int8),
  )
  assert is_target(labels, lengths, CLASSES, BLANK).tolist() == [True]
  assert feasible(labels, lengths, 300).tolist() == [True]
  # A blank of 256 is not the label 0 of uint8.
  zeros = jnp.zeros((1, 2), jnp.uint8)
  assert is_target(zeros, lengths, CLASSES, 256).tolist() == [True]


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_values_out_of_range_stay_so(dtype: Any) -> None:
  top = np.iinfo(np.int32).max
  large = np.array([0, 5, top, np.iinfo(dtype).max], dtype)
  assert as_int32(large).tolist() == [0, 5, top, top]
  assert as_int32(large).dtype == jnp.int32
  # 2**32 + 1 is not a class, though its low bits are 1.
  if dtype is np.int64:
    assert as_int32(np.array([2**32 + 1, -(2**40)])).tolist() == [top, -top - 1]
  labels = jnp.asarray([[np.iinfo(np.uint32).max]], jnp.uint32)
  loss = jax.jit(_loss)(jnp.zeros((1, 4, CLASSES)), labels, jnp.ones(1, int))
  assert np.isnan(loss).all()


def test_floats_are_no_labels() -> None:
  with pytest.raises(UserError, match="must be integers, got float32"):
    as_int32(np.zeros(3, np.float32))
