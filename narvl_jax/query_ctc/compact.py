"""CTC over a large vocabulary by way of the few classes that matter.

A target of L labels touches L+1 classes: blank and the labels. The alignment
is solved on their log-probabilities alone; the gradient goes back to all V
classes in one pass. How the logits are summarized and where the gradient goes
is left to a head: `dense.py` has the logits, `chunked.py` never does.

Letters: b batch, n queries, l labels, k = L+1 compact classes, v vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

# What optax takes for the logarithm of zero; -inf would give 0 * inf.
_LOG_ZERO = -1e5


class Summary(NamedTuple):
  """All that the loss needs to know of the logits, float32.

  Attributes:
    lse: [B, N] logsumexp over the true classes.
    total: [B, N] sum over the true classes.
    gathered: [B, N, L+1] logits of the compact classes.
  """

  lse: jax.Array
  total: jax.Array
  gathered: jax.Array


class LogitGradient(NamedTuple):
  """Gradient with respect to the logits, as it is before it is written out.

  That of a true class is scale * softmax + offset, less `taken` at the
  columns. Of columns with one id all but the first take nothing.

  Attributes:
    lse: [B, N].
    scale: [B].
    offset: [B].
    columns: int32 [B, L+1] class ids.
    first: int32 [B, L+1] the first column of equal id.
    log_probs: [B, N, L+1] of the columns.
    taken: [B, N, L+1].
  """

  lse: jax.Array
  scale: jax.Array
  offset: jax.Array
  columns: jax.Array
  first: jax.Array
  log_probs: jax.Array
  taken: jax.Array


class Head(Protocol):
  """Where logits come from; hashable."""

  @property
  def vocab_size(self) -> int:
    """Number of true classes."""
    ...

  def summarize(self, inputs: Any, columns: jax.Array) -> Summary:
    """Returns what the loss needs to know, given the columns [B, L+1]."""
    ...

  def pull_back(self, inputs: Any, gradient: LogitGradient) -> Any:
    """Returns the gradient with respect to the inputs."""
    ...


def feasible(
  labels: jax.Array, label_lengths: jax.Array, num_queries: int
) -> jax.Array:
  """Whether the queries suffice for the labels: N >= L + adjacent repeats.

  Args:
    labels: [B, L] integers, right padded.
    label_lengths: [B] integers.
    num_queries: N.

  Returns:
    bool [B].
  """
  inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
  repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)
  return label_lengths + repeats <= num_queries


def _terms(
  head: Head,
  blank_id: int,
  inputs: Any,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """CTC nll and mean log-probability per example, with one joint gradient.

  Differentiable once, in reverse, with respect to `inputs` only.

  Args:
    head: makes logits of the inputs.
    blank_id: id of the blank class.
    inputs: what the head takes.
    labels: [B, L] integers, right padded with any id.
    label_lengths: [B] integers.
    temper: float32 [B], multiplies the log-probabilities.

  Returns:
    nll [B], zero where infeasible, and the mean of the (tempered)
    log-probabilities over queries and true classes [B]; float32.
  """
  terms, _ = _forward(head, blank_id, inputs, labels, label_lengths, temper)
  return terms


def _forward(
  head: Head,
  blank_id: int,
  inputs: Any,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
  columns, first = class_columns(labels, label_lengths, blank_id)
  lse, total, gathered = head.summarize(inputs, columns)
  compact = gathered - lse[:, :, None]
  valid = jnp.arange(labels.shape[1]) < label_lengths[:, None]
  # Examples do not interact: the gradient of the sum holds each one's own.
  nll, pull_back = jax.vjp(
    lambda x: _compact_ctc(x, first, valid, temper), compact
  )
  (occupancy,) = pull_back(-jnp.ones_like(nll))
  # The sum over the classes is `temper` but for rounding.
  occupancy /= jnp.maximum(jnp.sum(occupancy, axis=-1, keepdims=True), 1e-6)
  ok = feasible(labels, label_lengths, lse.shape[1])
  nll = jnp.where(ok, nll, 0.0)
  mean = temper * jnp.mean(total / head.vocab_size - lse, axis=1)
  residuals = (inputs, lse, compact, occupancy, columns, first, temper, ok)
  return (nll, mean), residuals


def _backward(
  head: Head,
  blank_id: int,
  residuals: tuple[Any, ...],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[Any, None, None, None]:
  """Returns the gradient: scale * softmax + offset, less the occupancy.

  With c = temper and g = the posterior occupancy of a class:
  d nll / dz = c (softmax - g) and d mean / dz = c (1 / V - softmax) / N.
  """
  del blank_id
  inputs, lse, compact, occupancy, columns, first, temper, ok = residuals
  nll_bar, mean_bar = cotangents
  nll_bar = jnp.where(ok, nll_bar, 0.0)
  mean_bar = mean_bar / lse.shape[1]
  gradient = LogitGradient(
    lse=lse,
    scale=temper * (nll_bar - mean_bar),
    offset=temper * mean_bar / head.vocab_size,
    columns=columns,
    first=first,
    log_probs=compact,
    taken=(nll_bar * temper)[:, None, None] * occupancy,
  )
  return head.pull_back(inputs, gradient), None, None, None


ctc_terms = jax.custom_vjp(_terms, nondiff_argnums=(0, 1))
ctc_terms.defvjp(_forward, _backward)


def class_columns(
  labels: jax.Array, label_lengths: jax.Array, blank_id: int
) -> tuple[jax.Array, jax.Array]:
  """Vocabulary ids of the compact classes, and the first class of equal id.

  Class 0 is blank, class l+1 the label l. Padding becomes blank.

  Returns:
    int32 [B, L+1] both.
  """
  valid = jnp.arange(labels.shape[1]) < label_lengths[:, None]
  columns = jnp.pad(
    jnp.where(valid, labels, blank_id).astype(jnp.int32),
    ((0, 0), (1, 0)),
    constant_values=blank_id,
  )
  equal = columns[:, :, None] == columns[:, None, :]
  return columns, jnp.argmax(equal, axis=-1).astype(jnp.int32)


def _compact_ctc(
  log_probs: jax.Array, first: jax.Array, valid: jax.Array, temper: jax.Array
) -> jax.Array:
  """CTC of the gathered log-probabilities.

  `optax.ctc_loss` normalises over the classes it is given. Taking that
  normaliser out again accounts for the mass of all other classes, and for
  tempered log-probabilities, which do not sum to one. Its gradient nearly
  cancels in the same way; one more class of constant weight 1, which no label
  uses, keeps the part that cancels as small as the probabilities themselves.

  Args:
    log_probs: [B, N, L+1], blank first.
    first: int32 [B, L+1], see `class_columns`.
    valid: bool [B, L], False for padding.
    temper: [B].

  Returns:
    nll, float32 [B]; without meaning where infeasible.
  """
  unique = first == jnp.arange(first.shape[1])
  scores = jnp.maximum(temper[:, None, None] * log_probs, _LOG_ZERO)
  scores = jnp.where(unique[:, None, :], scores, _LOG_ZERO)
  scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 1)))
  # optax looks labels up by a product with one-hot rows, which accelerators
  # would round to bfloat16 or TF32.
  with jax.default_matmul_precision("highest"):
    nll = optax.ctc_loss(
      scores,
      jnp.zeros(scores.shape[:2]),
      first[:, 1:],
      1.0 - valid.astype(jnp.float32),
    )
  return nll - jnp.sum(jax.nn.logsumexp(scores, axis=-1), axis=1)
