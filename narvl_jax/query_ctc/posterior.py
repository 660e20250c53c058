"""Which query says which label: the posterior of the CTC alignment.

Letters: b batch, n queries, l labels.
"""

import jax
import jax.numpy as jnp

from narvl_jax.query_ctc.axes import MeshAxes
from narvl_jax.query_ctc.chunked import ChunkedLogits
from narvl_jax.query_ctc.compact import class_columns, feasible
from narvl_jax.query_ctc.loss import make_head

# Stands for the logarithm of zero; finite, so that no difference is NaN.
_LOG_ZERO = -1e30

_WHOLE = MeshAxes()


def label_posterior(
  logits: jax.Array | ChunkedLogits,
  labels: jax.Array,
  label_lengths: jax.Array,
  *,
  blank_id: int,
  vocab_size: int | None = None,
  axes: MeshAxes = _WHOLE,
) -> jax.Array:
  """Probability that a query says a label, given that the target is said.

  The second of two equal labels has its own alignment. As each label is said
  by one query or more, its probabilities sum to at least 1 over the queries;
  with that of blank, those of a query sum to 1 over the labels.

  Args:
    logits: [B, N, V], unnormalised, any float dtype; or `ChunkedLogits`.
    labels: [B, L] integers, right padded with any id; blank is not a label.
    label_lengths: [B] integers.
    blank_id: id of the blank class.
    vocab_size: number of true classes, None for all V.
    axes: mesh axes that split batch and classes.

  Returns:
    float32 [B, N, L] without gradient; zero for padding and where the queries
    do not suffice (see `feasible`).

  Source: Graves et al. 2006, section 4.1, the products of forward and backward
  variables over the likelihood.
  """
  size = logits.shape[-1] if vocab_size is None else vocab_size
  head, inputs = make_head(logits, size, axes)
  columns, _ = class_columns(labels, label_lengths, blank_id)
  summary = head.summarize(jax.lax.stop_gradient(inputs), columns)
  log_probs = summary.gathered - summary.lse[..., None]
  # A query says a label as often as the likelihood depends on its saying so.
  posterior = jax.grad(
    lambda x: jnp.sum(_log_likelihood(x, labels, label_lengths))
  )(log_probs)[..., 1:]
  ok = feasible(labels, label_lengths, logits.shape[1])
  return jnp.where(ok[:, None, None], posterior, 0.0)


def _log_likelihood(
  log_probs: jax.Array, labels: jax.Array, label_lengths: jax.Array
) -> jax.Array:
  """Log-likelihood of the target, by the forward variables.

  Unlike `optax.ctc_loss` it takes a number for each place of the target, also
  where two hold one label.

  Args:
    log_probs: float32 [B, N, L+1], blank first, then the places.
    labels: [B, L] integers.
    label_lengths: [B] integers.

  Returns:
    float32 [B]; without meaning where infeasible.
  """
  batch, length = labels.shape
  never = jnp.full((batch, 1), _LOG_ZERO)
  # From one label straight to the next; equal ones need a blank between.
  differs = labels[:, 1:] != labels[:, :-1]
  blank = jnp.concatenate(
    [jnp.zeros((batch, 1)), jnp.full((batch, length), _LOG_ZERO)], axis=1
  )
  said = jnp.full((batch, length), _LOG_ZERO)

  def step(
    state: tuple[jax.Array, jax.Array], query: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    # Of l labels said so far: the last query said blank, or the label itself.
    blank, said = state
    before = jnp.concatenate([never, said], axis=1)
    after = jnp.logaddexp(blank, before) + query[:, :1]
    onward = jnp.where(differs, said[:, :-1], _LOG_ZERO)
    onward = jnp.concatenate([never, onward], axis=1)[:, :length]
    said = jnp.logaddexp(jnp.logaddexp(said, blank[:, :-1]), onward)
    return (after, said + query[:, 1:]), None

  (blank, said), _ = jax.lax.scan(step, (blank, said), log_probs.swapaxes(0, 1))
  said = jnp.concatenate([never, said], axis=1)
  ends = jnp.logaddexp(blank, said)
  return jnp.take_along_axis(ends, label_lengths[:, None], axis=1)[:, 0]
