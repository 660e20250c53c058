"""Greedy decoding: one forward pass, arg-max per query, collapse on device."""

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.query_ctc import MeshAxes, collapse, query_ctc_loss
from narvl_jax.query_ctc.axes import split_of
from narvl_jax.query_ctc.log_space import LOG_ZERO

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

  The probability is that of the answer under the rule by which it is read:
  where repeats are merged, the sum over all alignments that collapse to the
  answer (the Query-CTC likelihood); where they are not, every query must say
  exactly what it said, so it is the product of the arg-max probabilities.
  Both are taken after the forbidden classes have been removed.

  Over a split vocabulary only [B, N] and [B, N, L+1] numbers cross devices,
  and the answers are the same.

  Args:
    logits: [B, N, V] float32.
    merge_repeats: [B] bool, whether equal neighbours are one token.
    blank_id: id of the CTC blank.
    pad_id: id that fills the tail of `ids`; never part of an answer.
    forbidden: [vocab_size] bool, classes that must not be predicted.
    vocab_size: number of true classes, those after it are padding of the
      table; None for all V.
    axes: mesh axes that split batch and classes.

  Returns:
    ids [B, N] int32, lengths [B] int32, log_prob [B] float32.

  Raises:
    UserError: the classes do not divide by their mesh axis.
  """
  logits = logits.astype(jnp.float32)
  classes = logits.shape[-1]
  size = classes if vocab_size is None else vocab_size
  if forbidden is not None or size < classes:
    never = np.zeros(size, bool) if forbidden is None else forbidden
    never = np.pad(never, (0, classes - size), constant_values=True)
    logits = jnp.where(never, LOG_ZERO, logits)
  token_ids, best_log_probs = _best_classes(logits, axes)
  ids, lengths = collapse(
    token_ids, blank_id=blank_id, pad_id=pad_id, merge_repeats=merge_repeats
  )
  path_log_prob = jnp.sum(best_log_probs, axis=-1)
  # The arg-max path collapses to the answer, so the loss is always finite.
  answer_log_prob = -query_ctc_loss(
    logits, ids, lengths, blank_id=blank_id, axes=axes
  )
  log_prob = jnp.where(merge_repeats, answer_log_prob, path_log_prob)
  return {
    "ids": ids,
    "lengths": lengths,
    # Rounding may push the sum over alignments past 1.
    "log_prob": jnp.minimum(log_prob, 0.0),
  }


def _first(found: jax.Array) -> jax.Array:
  """Returns the place int32 [...] of the first True of bool [..., V].

  On a CPU `argmax` takes ten times as long: it does not use vectors.
  """
  classes = found.shape[-1]
  places = jnp.arange(classes, dtype=jnp.int32)
  first = jnp.min(jnp.where(found, places, classes), axis=-1)
  # None where the logits are not numbers.
  return jnp.minimum(first, classes - 1)


def _best_classes(
  logits: jax.Array, axes: MeshAxes
) -> tuple[jax.Array, jax.Array]:
  """Returns the arg-max int32 [B, N] and its log-probability [B, N].

  The smallest id wins a tie.
  """
  split = split_of(axes, logits.shape[0], logits.shape[-1])

  def local(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(logits, axis=-1)
    ids = _first(logits == largest[..., None])
    if split.vocab is not None:
      ids += split.first_class(logits.shape[-1])
      # [devices, B, N]; the first device has the smallest ids.
      ids, values = jax.lax.all_gather((ids, largest), split.vocab)
      winner = jnp.argmax(values, axis=0)[None]
      ids, largest = (
        jnp.take_along_axis(x, winner, axis=0)[0] for x in (ids, values)
      )
    mass = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    return ids, -jnp.log(split.sum_over_classes(mass))

  return split.run(
    local,
    logits,
    in_specs=(split.logits,),
    out_specs=(split.rows, split.rows),
  )
