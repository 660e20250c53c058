"""Which query says which label: the posterior of the CTC alignment.

Letters: b batch, n queries, l labels.
"""

import jax
import jax.numpy as jnp

from narvl_jax.query_ctc.alignment import log_likelihood
from narvl_jax.query_ctc.axes import MeshAxes
from narvl_jax.query_ctc.chunked import ChunkedLogits
from narvl_jax.query_ctc.compact import class_columns
from narvl_jax.query_ctc.loss import check_input, make_head
from narvl_jax.query_ctc.targets import as_int32, feasible, is_target

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
    float32 [B, N, L] without gradient, also with `jax_enable_x64`. Zero for
    padding, and where the queries do not suffice (see `feasible`) whatever
    the logits hold. NaN where the loss is not finite (see `query_ctc_loss`).

  Raises:
    UserError: see `query_ctc_loss`.

  Source: Graves et al. 2006, section 4.1, the products of forward and backward
  variables over the likelihood.
  """
  size = check_input(logits, labels, label_lengths, blank_id, vocab_size)
  labels, label_lengths = as_int32(labels), as_int32(label_lengths)
  head, inputs = make_head(logits, size, axes)
  columns, _ = class_columns(labels, label_lengths, blank_id)
  summary = head.summarize(jax.lax.stop_gradient(inputs), columns)
  normalizer = jax.tree.map(lambda x: x[..., None], summary.normalizer)
  log_probs = normalizer.precise_log_probs(summary.gathered)
  # A query says a label as often as the likelihood depends on its saying so.
  values, pull_back = jax.vjp(
    lambda x: log_likelihood(log_probs._replace(high=x), labels, label_lengths),
    log_probs.high,
  )
  (posterior,) = pull_back(jnp.ones_like(values))
  is_good = is_target(labels, label_lengths, size, blank_id)
  ok = feasible(labels, label_lengths, logits.shape[1]) | ~is_good
  possible = is_good & jnp.isfinite(values)
  fill = jnp.where(ok & ~possible, jnp.nan, 0.0).astype(jnp.float32)
  return jnp.where(
    (ok & possible)[:, None, None], posterior[..., 1:], fill[:, None, None]
  )
