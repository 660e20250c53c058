"""The posterior of the CTC alignment: which query predicts which label."""

import jax
import jax.numpy as jnp

from narvl_jax.query_ctc.axes import MeshAxes
from narvl_jax.query_ctc.chunked import ChunkedLogits
from narvl_jax.query_ctc.compact import class_columns
from narvl_jax.query_ctc.log_space import LOG_ZERO, Pair, log_add
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
  """Probability that a query emits a label of the target, given the target.

  Equal labels are distinguished by their places in the target. Over the
  queries, the probabilities of a label sum to at least 1, since one or more
  queries emit it. Over the labels, those of a query sum to 1 together with the
  probability of blank.

  Args:
    logits: as in `query_ctc_loss`; so are the other arguments.

  Returns:
    float32 [B, N, L] without gradient, also with `jax_enable_x64`. Zero for
    padding, and for an infeasible target (see `feasible`) with any logits
    hold. NaN where the loss is not finite (see `query_ctc_loss`).

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
  # The posterior is the gradient of the log-likelihood with respect to the
  # log-probabilities.
  values, pull_back = jax.vjp(
    lambda x: _log_likelihood(
      log_probs._replace(high=x), labels, label_lengths
    ),
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


def _log_likelihood(
  log_probs: Pair, labels: jax.Array, label_lengths: jax.Array
) -> jax.Array:
  """Returns the log-likelihood of the target by the forward algorithm.

  `optax.ctc_loss` has one log-probability for all places of a label. This has
  one for each place, and sums them as pairs of float32, so that alignments of
  equal likelihood stay equal at any magnitude. Log-probabilities need not be
  normalised; their sum over the queries must be finite.

  Args:
    log_probs: [B, N, L+1], blank first, then the places of the target.
    labels: [B, L] integers.
    label_lengths: [B] integers in 0..L.

  Returns:
    float32 [B]; -inf if no alignment is possible.

  Source: Graves et al. 2006, section 4.1.
  """
  # Whether label l + 1 may follow label l without a blank between.
  differs = labels[:, 1:] != labels[:, :-1]

  def shift(x: jax.Array, zero: float) -> jax.Array:
    """Moves every entry to the next place."""
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=zero)

  def shift_if_different(x: jax.Array, zero: float) -> jax.Array:
    x = jnp.where(differs, x[:, :-1], zero)
    return shift(x, zero)[:, : labels.shape[1]]

  def step(
    state: tuple[Pair, Pair], query: Pair
  ) -> tuple[tuple[Pair, Pair], None]:
    # After l labels, the last query emitted blank [B, L+1] or label l [B, L].
    blank, label = state
    to_blank = log_add(blank, label.map(shift))
    to_label = log_add(label, blank.map(lambda x, _: x[:, :-1]))
    to_label = log_add(to_label, label.map(shift_if_different))
    of_blank = query.map(lambda x, _: x[:, :1])
    of_label = query.map(lambda x, _: x[:, 1:])
    return (to_blank + of_blank, to_label + of_label), None

  blank = Pair.of(jnp.full_like(log_probs.high[:, 0], LOG_ZERO))
  label = blank.map(lambda x, _: x[:, 1:])
  blank = blank._replace(high=blank.high.at[:, 0].set(0.0))
  by_query = log_probs.map(lambda x, _: x.swapaxes(0, 1))
  (blank, label), _ = jax.lax.scan(step, (blank, label), by_query)
  ends = log_add(blank, label.map(shift)).high
  return jnp.take_along_axis(ends, label_lengths[:, None], axis=1)[:, 0]
