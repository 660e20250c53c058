"""Decoding under a constraint from the logits of one decoder pass.

`best_candidate` scores every answer of a closed set, `constrained_greedy`
takes the best path through an automaton, and `prefix_beam` searches for the
likeliest answers.

All take whole logits: logits whose classes are split over devices must be
gathered first. Log-probabilities of answers are over all alignments, see
`likelihood`.

They share arguments: logits [B, N, V] of any float dtype; `merge_repeats`, bool
for all examples or bool [B]; `forbidden`, bool [vocab_size] of classes that are
removed before the softmax; `vocab_size`, the number of true classes, None for
all V; `pad_id`, which fills the tails of ids.

Letters: B batch, N queries, C candidates, L labels, E edges, V classes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.decoding.classes import masked, never_predicted
from narvl_jax.decoding.likelihood import sum_alignments
from narvl_jax.decoding.viterbi import best_path
from narvl_jax.errors import UserError
from narvl_jax.query_ctc import collapse
from narvl_jax.query_ctc.automaton import START, Automaton, queries_needed
from narvl_jax.query_ctc.log_space import (
  LOG_ZERO,
  NO_ANSWER,
  Normalizer,
  normalizer,
  show_no_answer,
)
from narvl_jax.query_ctc.prefix_beam_search import prefix_beam_search
from narvl_jax.query_ctc.targets import as_int32, check_classes, check_targets

Merge = bool | jax.Array


def check_constraint(
  automaton: Automaton, num_queries: int, *, merge_repeats: bool
) -> None:
  """Checks on the host that the queries suffice for some answer.

  Raises:
    UserError: all answers need more queries.
  """
  bound = num_queries
  # The number for the message is exact only within the bound.
  while (least := _shortest(automaton, merge_repeats, bound)) > bound:
    # A shortest answer uses no edge twice, with at most one blank each.
    if bound > 2 * len(automaton.token):
      raise UserError(
        "the constraint allows no answer at all: no path leads to an end; give"
        " it at least one answer"
      )
    bound *= 2
  if least <= num_queries:
    return
  raise UserError(
    f"the shortest answer that the constraint allows needs {least} queries,"
    f" but the model has {num_queries}; nearest:"
    f" --config.model.num_queries={least}, or decode without the constraint"
  )


def _shortest(automaton: Automaton, merge: bool, most: int) -> int:
  """Returns how many queries the shortest answer needs, exact up to `most`."""
  return int(queries_needed(automaton, merge, most).from_state[START])


def masked_log_probs(
  logits: jax.Array,
  *,
  forbidden: np.ndarray | None = None,
  vocab_size: int | None = None,
) -> jax.Array:
  """Returns float32 [B, N, V] log-probabilities over the allowed classes."""
  never = never_predicted(logits.shape[-1], forbidden, vocab_size)
  return jax.nn.log_softmax(masked(logits, never), axis=-1)


def prefix_beam(
  logits: jax.Array,
  *,
  blank_id: int,
  pad_id: int,
  merge_repeats: Merge = True,
  forbidden: np.ndarray | None = None,
  vocab_size: int | None = None,
  **options: Any,
) -> dict[str, jax.Array]:
  """Searches for the likeliest answers; see `prefix_beam_search`.

  Args:
    **options: beam_size, num_best, constraint, candidates_per_query.

  Returns:
    ids int32 [B, num_best, N], lengths int32 [B, num_best] and log_probs
    float32 [B, num_best], best first. Scores of the search lack the alignments
    that left the beam; these log-probabilities are over all alignments.
  """
  ids, lengths, scores = prefix_beam_search(
    masked_log_probs(logits, forbidden=forbidden, vocab_size=vocab_size),
    blank_id=blank_id,
    pad_id=pad_id,
    merge_repeats=merge_repeats,
    **options,
  )
  never = never_predicted(logits.shape[-1], forbidden, vocab_size)
  log_probs = _answer_log_probs(
    logits,
    ids,
    lengths,
    _normalizers(logits, never),
    never,
    blank_id,
    merge_repeats,
  )
  # Where there is no answer, the score is NO_ANSWER or NaN.
  log_probs = jnp.where(scores > NO_ANSWER, log_probs, scores)
  order = jnp.argsort(-log_probs, axis=1, stable=True)
  lengths, log_probs = (
    jnp.take_along_axis(x, order, axis=1) for x in (lengths, log_probs)
  )
  ids = jnp.take_along_axis(ids, order[..., None], axis=1)
  return {"ids": ids, "lengths": lengths, "log_probs": log_probs}


def best_candidate(
  logits: jax.Array,
  candidates: jax.Array | np.ndarray,
  lengths: jax.Array | np.ndarray,
  *,
  blank_id: int,
  merge_repeats: Merge = True,
  forbidden: np.ndarray | None = None,
  vocab_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Scores all answers of a closed set exactly.

  Args:
    candidates: int32 [C, L] labels, right padded with any id.
    lengths: int32 [C], each at least 1.

  Returns:
    The best candidate, int32 [B], the first of equals, and the Query-CTC
    log-probability of each, float32 [B, C]. Candidates that need more queries
    than there are have -1e9 or less, and less than all others.

  Raises:
    UserError: there is no candidate, or a label is blank or not a class.
  """
  if not candidates.shape[0]:
    raise UserError("there are no candidates to choose from; give at least one")
  size = check_classes(logits.shape[-1], vocab_size, blank_id)
  check_targets(candidates, lengths, size, blank_id)
  never = never_predicted(logits.shape[-1], forbidden, vocab_size)
  b = logits.shape[0]
  log_probs = _answer_log_probs(
    logits,
    jnp.broadcast_to(as_int32(candidates), (b, *candidates.shape)),
    jnp.broadcast_to(as_int32(lengths), (b, *lengths.shape)),
    _normalizers(logits, never),
    never,
    blank_id,
    merge_repeats,
  )
  best = jnp.argmax(log_probs, axis=1).astype(jnp.int32)
  return best, show_no_answer(log_probs)


def constrained_greedy(
  logits: jax.Array,
  constraint: Automaton,
  *,
  blank_id: int,
  pad_id: int,
  merge_repeats: Merge = True,
  forbidden: np.ndarray | None = None,
  vocab_size: int | None = None,
) -> dict[str, jax.Array]:
  """Finds the likeliest alignment whose answer the constraint allows.

  This is greedy decoding under a constraint: without one, the likeliest
  alignment is the arg-max of every query. Time grows with the number of edges,
  not of answers.

  Args:
    constraint: must contain eos if the targets were trained with it.
    pad_id: id that fills the tail of `ids`; not a label of the constraint.

  Returns:
    ids int32 [B, N], lengths int32 [B], `path_log_prob` float32 [B] of the
    alignment, and `log_prob` float32 [B] of the answer, summed over all its
    alignments. If no answer is possible, the length is 0 and both are -1e9.
    NaN in the logits of an example makes both NaN.

  Source: Graves 2012, "Supervised Sequence Labelling", section 7.5; Viterbi.
  """
  never = never_predicted(logits.shape[-1], forbidden, vocab_size)
  normalizers = _normalizers(logits, never)
  merge = jnp.broadcast_to(jnp.asarray(merge_repeats, bool), logits.shape[:1])
  blank, labels = _gather(logits, constraint, normalizers, never, blank_id)
  search = functools.partial(
    best_path, constraint=constraint, blank_id=blank_id
  )
  classes, path_log_prob = jax.vmap(search, in_axes=(1, 1))(
    blank, labels, merge_repeats=merge
  )
  found = path_log_prob != LOG_ZERO
  classes = jnp.where(found[:, None], classes, blank_id)
  ids, lengths = collapse(
    classes, blank_id=blank_id, pad_id=pad_id, merge_repeats=merge
  )
  log_prob = _answer_log_probs(
    logits, ids[:, None], lengths[:, None], normalizers, never, blank_id, merge
  )[:, 0]
  return {
    "ids": ids,
    "lengths": lengths,
    "path_log_prob": jnp.where(found, path_log_prob, NO_ANSWER),
    "log_prob": jnp.where(found, log_prob, NO_ANSWER),
  }


def _masked_row(
  logits: jax.Array, query: jax.Array, never: np.ndarray | None
) -> jax.Array:
  """Returns the logits [B, V] of one query, out of [B, N, V]."""
  row = jax.lax.dynamic_index_in_dim(logits, query, -2, keepdims=False)
  return masked(row, never)


def _row(
  logits: jax.Array,
  query: jax.Array,
  normalizers: Normalizer,
  never: np.ndarray | None,
) -> jax.Array:
  """Returns the log-probabilities [B, V] of one query."""
  own = jax.tree.map(lambda x: x[query], normalizers)
  return own.log_probs(_masked_row(logits, query, never))


def _normalizers(logits: jax.Array, never: np.ndarray | None) -> Normalizer:
  """Returns normalizers over the allowed classes, [N, B, 1].

  One query at a time, so that no second array of the size of the logits exists.
  """
  by_query = jax.lax.map(
    lambda query: normalizer(_masked_row(logits, query, never)),
    jnp.arange(logits.shape[1]),
  )
  return jax.tree.map(lambda x: x[..., None], by_query)


def _gather(
  logits: jax.Array,
  constraint: Automaton,
  normalizers: Normalizer,
  never: np.ndarray | None,
  blank_id: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns log-probabilities [N, B] of blank and [N, B, E] of the edges."""
  token = jnp.asarray(constraint.token)

  def of_query(query: jax.Array) -> tuple[jax.Array, jax.Array]:
    row = _row(logits, query, normalizers, never)
    return row[:, blank_id], row[:, token]

  return jax.lax.map(of_query, jnp.arange(logits.shape[1]))


def _answer_log_probs(
  logits: jax.Array,
  labels: jax.Array,
  lengths: jax.Array,
  normalizers: Normalizer,
  never: np.ndarray | None,
  blank_id: int,
  merge_repeats: Merge,
) -> jax.Array:
  """Returns the log-probabilities of several answers an example, [B, C].

  Args:
    logits: [B, N, V].
    labels: int32 [B, C, L].
    lengths: int32 [B, C].
    normalizers: [N, B, 1].
    never: bool [V].
    merge_repeats: bool or bool [B].
  """

  def emissions(query: jax.Array) -> tuple[jax.Array, jax.Array]:
    row = _row(logits, query, normalizers, never)
    return row[:, blank_id], jax.vmap(lambda x, ids: x[ids])(row, labels)

  return sum_alignments(
    emissions, labels, lengths, merge_repeats, logits.shape[1]
  )
