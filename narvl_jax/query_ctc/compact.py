"""CTC over a large vocabulary, computed on the few classes of the target.

A target of L labels has L+1 compact classes: blank and its labels. CTC runs on
their log-probabilities alone; the gradient of all V classes is then written in
one pass. A head summarizes the logits and writes the gradient: `dense.py` for
whole logits, `chunked.py` for logits that are never stored.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from narvl_jax.query_ctc.log_space import LOG_ZERO, Normalizer
from narvl_jax.query_ctc.targets import feasible, is_target

# Scores are shifted such that the best class of a query is not below -12,
# beside an extra class of score 0. Far below, its digits would be lost.
_LEAST_BEST = 12.0


class Summary(NamedTuple):
  """Statistics of the logits from which the loss is computed, float32.

  Attributes:
    normalizer: [B, N] over the true classes.
    total: [B, N] sum over the true classes.
    gathered: [B, N, L+1] logits of the compact classes.
  """

  normalizer: Normalizer
  total: jax.Array
  gathered: jax.Array


class LogitGradient(NamedTuple):
  """Gradient with respect to the logits in compact form.

  The gradient of a true class is scale * softmax + offset, minus `taken` at
  the columns. Only the first of several columns with the same id has a nonzero
  `taken`.

  Attributes:
    normalizer: [B, N].
    scale: [B].
    offset: [B].
    columns: int32 [B, L+1] class ids.
    first: int32 [B, L+1] index of the first column with the same id.
    log_probs: [B, N, L+1] at the columns.
    taken: [B, N, L+1].
    live: bool [B], False for an example whose gradient is zero for any
      logits; all of its other values are then zero.
  """

  normalizer: Normalizer
  scale: jax.Array
  offset: jax.Array
  columns: jax.Array
  first: jax.Array
  log_probs: jax.Array
  taken: jax.Array
  live: jax.Array


class Head(Protocol):
  """A source of logits; hashable."""

  @property
  def vocab_size(self) -> int:
    """Number of true classes."""
    ...

  def summarize(self, inputs: Any, columns: jax.Array) -> Summary:
    """Returns the statistics of the logits; columns are int32 [B, L+1]."""
    ...

  def pull_back(self, inputs: Any, gradient: LogitGradient) -> Any:
    """Returns the gradient with respect to the inputs."""
    ...


def _terms(
  head: Head,
  blank_id: int,
  inputs: Any,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """CTC nll and mean log-probability of every example.

  Differentiable once, in reverse mode, with respect to `inputs` only.

  Args:
    labels: [B, L] integers, right padded with any id.
    label_lengths: [B] integers.
    temper: float32 [B], factor of the log-probabilities.

  Returns:
    The nll, float32 [B], and the mean of the tempered log-probabilities over
    queries and true classes, float32 [B]. The nll is zero for an infeasible
    target; both are NaN for an invalid one.
  """
  terms, _ = forward(head, blank_id, inputs, labels, label_lengths, temper)
  return terms


def forward(
  head: Head,
  blank_id: int,
  inputs: Any,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
  """Returns the terms, see `_terms`, and what `gradient` needs."""
  is_good = is_target(labels, label_lengths, head.vocab_size, blank_id)
  # An invalid target is NaN, which the training step notices.
  temper = jnp.where(is_good, temper, jnp.nan)
  columns, first = class_columns(labels, label_lengths, blank_id)
  normalizer, total, gathered = head.summarize(inputs, columns)
  by_column = jax.tree.map(lambda x: x[:, :, None], normalizer)
  # Computed in higher precision and rounded once.
  log_probs = by_column.precise_log_probs(gathered).high
  valid = jnp.arange(labels.shape[1]) < label_lengths[:, None]
  # Examples are independent: the gradient of their sum is that of each.
  log_likelihoods, pull_back = jax.vjp(
    lambda x: _log_likelihood(x, first, valid),
    temper[:, None, None] * log_probs,
  )
  (occupancy,) = pull_back(jnp.ones_like(log_likelihoods))
  # Removes the rounding error: the sum over the classes is 1.
  occupancy /= jnp.sum(occupancy, axis=-1, keepdims=True)
  # A target of probability zero has no posterior.
  possible = jnp.isfinite(log_likelihoods)[:, None, None]
  occupancy = jnp.where(possible, occupancy, jnp.nan)
  ok = feasible(labels, label_lengths, total.shape[1]) | ~is_good
  occupancy = jnp.where(ok[:, None, None], occupancy, 0.0)
  nll = jnp.where(ok, -log_likelihoods, 0.0)
  mean = normalizer.log_probs(total / head.vocab_size)
  mean = temper * jnp.mean(mean, axis=1)
  residuals = (normalizer, log_probs, occupancy, columns, first, temper, ok)
  return (nll, mean), (inputs, *residuals)


def _backward(
  head: Head,
  blank_id: int,
  residuals: tuple[Any, ...],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[Any, None, None, None]:
  """Returns the gradient of the inputs."""
  del blank_id
  inputs, *_ = residuals
  found = gradient(head, residuals, cotangents)
  return head.pull_back(inputs, found), None, None, None


def gradient(
  head: Head,
  residuals: tuple[Any, ...],
  cotangents: tuple[jax.Array, jax.Array],
) -> LogitGradient:
  """Returns the gradient of the logits.

  With c = temper and the posterior g of a class at a query:
  d nll / dz = c (softmax - g) and d mean / dz = c (1 / V - softmax) / N.
  """
  _, normalizer, log_probs, occupancy, columns, first, temper, ok = residuals
  nll_bar, mean_bar = cotangents
  nll_bar = jnp.where(ok, nll_bar, 0.0)
  # A zero cotangent gives a zero gradient, even where values are NaN.
  live = (nll_bar != 0) | (mean_bar != 0)

  def zero_unless_live(x: jax.Array) -> jax.Array:
    return jnp.where(live.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)

  mean_bar = mean_bar / log_probs.shape[1]
  return LogitGradient(
    normalizer=jax.tree.map(zero_unless_live, normalizer),
    scale=zero_unless_live(temper * (nll_bar - mean_bar)),
    offset=zero_unless_live(temper * mean_bar / head.vocab_size),
    columns=columns,
    first=first,
    log_probs=zero_unless_live(log_probs),
    taken=zero_unless_live((nll_bar * temper)[:, None, None] * occupancy),
    live=live,
  )


ctc_terms = jax.custom_vjp(_terms, nondiff_argnums=(0, 1))
ctc_terms.defvjp(forward, _backward)


def _log_likelihood(
  log_probs: jax.Array, first: jax.Array, valid: jax.Array
) -> jax.Array:
  """Log-likelihood of the target by `optax.ctc_loss`, on the compact classes.

  `optax.ctc_loss` normalises over the classes that it is given. Adding its
  normaliser back accounts for the mass of all other classes, and for tempered
  log-probabilities, which do not sum to one. The gradients of both nearly
  cancel. An extra class of score 0, which no label uses, keeps the cancelling
  part as small as the probabilities themselves.

  Args:
    log_probs: float32 [B, N, L+1], blank first, at most 0; may be -inf or NaN.
    first: int32 [B, L+1], see `class_columns`.
    valid: bool [B, L], False for padding.

  Returns:
    float32 [B], to the precision of float32; -inf if the target is impossible.
  """
  # Finite, since optax multiplies it by zeros. The 2N + 2 of them that an
  # alignment may sum must not overflow.
  log_zero = -1e38 / (2 * log_probs.shape[1] + 2)
  # Where even the best class is very unlikely, scores are relative to it, so
  # that float32 resolves their differences for logits of any magnitude.
  best = jnp.max(log_probs, axis=-1, keepdims=True)
  excess = jnp.clip(best + _LEAST_BEST, log_zero, 0.0)
  excess = jax.lax.stop_gradient(excess)
  scores = jnp.maximum(log_probs - excess, log_zero)
  unique = first == jnp.arange(first.shape[1])
  scores = jnp.where(unique[:, None, :], scores, log_zero)
  scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 1)))
  # optax looks up labels by a product with one-hot rows, which accelerators
  # would round to bfloat16 or TF32.
  with jax.default_matmul_precision("highest"):
    nll = optax.ctc_loss(
      scores,
      jnp.zeros(scores.shape[:2]),
      first[:, 1:],
      1.0 - valid.astype(jnp.float32),
      log_epsilon=log_zero,
    )
  value = jnp.sum(jax.nn.logsumexp(scores, axis=-1), axis=1) - nll
  value = jnp.where(value < log_zero / 2, LOG_ZERO, value)
  # optax computes in float64 where that is on.
  return value.astype(log_probs.dtype) + jnp.sum(excess, axis=(1, 2))


def class_columns(
  labels: jax.Array, label_lengths: jax.Array, blank_id: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the ids of the compact classes, and the first class of equal id.

  Class 0 is blank, class l + 1 is label l, and padding is blank.

  Returns:
    Ids int32 [B, L+1], and indices of compact classes int32 [B, L+1].
  """
  valid = jnp.arange(labels.shape[1]) < label_lengths[:, None]
  # Negative ids would index from the end; such targets are NaN anyway.
  valid &= labels >= 0
  columns = jnp.pad(
    jnp.where(valid, labels, blank_id).astype(jnp.int32),
    ((0, 0), (1, 0)),
    constant_values=blank_id,
  )
  equal = columns[:, :, None] == columns[:, None, :]
  return columns, jnp.argmax(equal, axis=-1).astype(jnp.int32)
