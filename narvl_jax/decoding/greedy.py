"""Greedy decoding: one forward pass, arg-max per query, collapse on device."""

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.decoding.classes import masked, never_predicted
from narvl_jax.decoding.likelihood import answer_log_prob
from narvl_jax.query_ctc import MeshAxes, collapse
from narvl_jax.query_ctc.axes import split_of

_WHOLE = MeshAxes()


def greedy_decode(
  logits: jax.Array,
  merge_repeats: jax.Array,
  *,
  blank_id: int,
  pad_id: int,
  forbidden: np.ndarray | None = None,
  vocab_size: int | None = None,
  axes: MeshAxes = _WHOLE,
) -> dict[str, jax.Array]:
  """Returns the greedy answer of every example and its log-probability.

  The probability of an answer is the sum over all alignments that collapse to
  it, whether repeats are merged or not. Forbidden classes are removed before.

  With a split vocabulary the answers are the same, and devices exchange only
  [B, N] and [B, N, L+1] numbers.

  Args:
    logits: [B, N, V] float32.
    merge_repeats: bool [B], whether equal neighbours are one token.
    blank_id: id of the CTC blank.
    pad_id: id that fills the tail of `ids`; never part of an answer.
    forbidden: bool [vocab_size], classes that must not be predicted.
    vocab_size: number of true classes, None for all V.
    axes: mesh axes that split batch and classes.

  Returns:
    ids int32 [B, N], lengths int32 [B], log_prob float32 [B].

  Raises:
    UserError: the classes do not divide by their mesh axis.
  """
  never = never_predicted(logits.shape[-1], forbidden, vocab_size)
  logits = masked(logits, never)
  ids, lengths = collapse(
    _best_classes(logits, axes),
    blank_id=blank_id,
    pad_id=pad_id,
    merge_repeats=merge_repeats,
  )
  log_prob = answer_log_prob(
    logits, ids, lengths, merge_repeats, blank_id=blank_id, axes=axes
  )
  return {
    "ids": ids,
    "lengths": lengths,
    # Rounding may push the sum over alignments past 1.
    "log_prob": jnp.minimum(log_prob, 0.0),
  }


def _first(found: jax.Array) -> jax.Array:
  """Returns the index int32 [...] of the first True in bool [..., V].

  On a CPU, `argmax` is not vectorized and takes ten times as long.
  """
  classes = found.shape[-1]
  places = jnp.arange(classes, dtype=jnp.int32)
  first = jnp.min(jnp.where(found, places, classes), axis=-1)
  # There is none where the logits are NaN.
  return jnp.minimum(first, classes - 1)


def _best_classes(logits: jax.Array, axes: MeshAxes) -> jax.Array:
  """Returns the arg-max int32 [B, N]; the smallest id wins a tie."""
  split = split_of(axes, logits.shape[0], logits.shape[-1])

  def local(logits: jax.Array) -> jax.Array:
    largest = jnp.max(logits, axis=-1)
    ids = _first(logits == largest[..., None])
    if split.vocab is None:
      return ids
    ids += split.first_class(logits.shape[-1])
    # [devices, B, N]; the first device has the smallest ids.
    ids, values = jax.lax.all_gather((ids, largest), split.vocab)
    winner = jnp.argmax(values, axis=0)[None]
    return jnp.take_along_axis(ids, winner, axis=0)[0]

  return split.run(
    local, logits, in_specs=(split.logits,), out_specs=split.rows
  )
