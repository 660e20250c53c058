"""Decoding under a constraint from the logits of one decoder pass.

`best_candidate` knows every answer and scores them all, `constrained_greedy`
takes the best path through an automaton, and `prefix_beam` searches for the
likeliest answers. The decoder runs once for each, whatever the answers'
length.

All take whole logits: those whose classes are split over devices must be
gathered first. Where repeats are not merged a query that does not say blank is
a label of its own, so that "a a" needs no blank between; probabilities are
then sums over the places of the blanks.

Letters: b batch, n queries, c candidates, l labels, e edges, s states,
v classes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.decoding.constraint import START, Automaton
from narvl_jax.decoding.viterbi import best_path
from narvl_jax.errors import UserError
from narvl_jax.query_ctc import collapse
from narvl_jax.query_ctc.automaton import queries_needed
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
  """Checks on the host that some answer fits on the queries.

  Raises:
    UserError: all need more.
  """
  bound = num_queries
  # What needs more than the bound may be found to have no end at all.
  while (least := _shortest(automaton, merge_repeats, bound)) > bound:
    # A shortest answer takes no edge twice, and a blank each at most.
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
  """Returns how many queries the shortest answer needs, if at most `most`."""
  return int(queries_needed(automaton, merge, most).from_state[START])


def masked_log_probs(
  logits: jax.Array,
  *,
  forbidden: np.ndarray | None = None,
  vocab_size: int | None = None,
) -> jax.Array:
  """Returns float32 [B, N, V] log-probabilities over the allowed classes.

  Args:
    logits: [B, N, V] of any float dtype.
    forbidden: [vocab_size] bool, classes that must not be predicted; they are
      removed before the softmax.
    vocab_size: number of true classes, None for all V.
  """
  never = _never(logits.shape[-1], forbidden, vocab_size)
  return jax.nn.log_softmax(_masked(logits, never), axis=-1)


def prefix_beam(
  logits: jax.Array,
  *,
  blank_id: int,
  pad_id: int,
  forbidden: np.ndarray | None = None,
  vocab_size: int | None = None,
  **options: Any,
) -> dict[str, jax.Array]:
  """Searches for the likeliest answers; see `prefix_beam_search`.

  Args:
    logits: [B, N, V].
    blank_id: id of the CTC blank.
    pad_id: id that fills the tail of `ids`.
    forbidden: see `masked_log_probs`.
    vocab_size: number of true classes, None for all V.
    **options: beam_size, num_best, merge_repeats, constraint,
      candidates_per_query.

  Returns:
    ids int32 [B, num_best, N], lengths int32 [B, num_best] and log_probs
    float32 [B, num_best], best first.
  """
  ids, lengths, scores = prefix_beam_search(
    masked_log_probs(logits, forbidden=forbidden, vocab_size=vocab_size),
    blank_id=blank_id,
    pad_id=pad_id,
    **options,
  )
  return {"ids": ids, "lengths": lengths, "log_probs": scores}


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
  """Scores all answers of a closed set: exact, in one decoder pass.

  Args:
    logits: [B, N, V] of any float dtype.
    candidates: int32 [C, L] labels, right padded with any id.
    lengths: int32 [C], each at least 1.
    blank_id: id of the CTC blank.
    merge_repeats: bool for all examples or bool [B].
    forbidden: see `masked_log_probs`.
    vocab_size: number of true classes, None for all V.

  Returns:
    The best candidate, int32 [B], the first of equals, and the Query-CTC
    log-probability of each, float32 [B, C]; for one that needs more queries
    than there are, -1e9 or less, and less than that of any other.

  Raises:
    UserError: there is no candidate, or one has a label that is no class or
      is blank.
  """
  if not candidates.shape[0]:
    raise UserError("there are no candidates to choose from; give at least one")
  size = check_classes(logits.shape[-1], vocab_size, blank_id)
  check_targets(candidates, lengths, size, blank_id)
  never = _never(logits.shape[-1], forbidden, vocab_size)
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
  """Takes the likeliest alignment whose answer the constraint allows.

  An alignment says a label or blank at every query; the labels it collapses to
  must lead to an end. That is what greedy decoding does without a constraint.
  Time grows with the number of edges, not of answers.

  Args:
    logits: [B, N, V] of any float dtype.
    constraint: must hold eos if the targets were trained with it.
    blank_id: id of the CTC blank.
    pad_id: id that fills the tail of `ids`; no label of the constraint.
    merge_repeats: bool for all examples or bool [B].
    forbidden: see `masked_log_probs`.
    vocab_size: number of true classes, None for all V.

  Returns:
    ids int32 [B, N], lengths int32 [B], `path_log_prob` float32 [B] of the
    alignment and `log_prob` float32 [B] of the answer, summed over all its
    alignments. Where no answer is possible the length is 0 and both are -1e9.
    NaN in the logits of an example makes both NaN.

  Source: Graves 2012, "Supervised Sequence Labelling", section 7.5; Viterbi.
  """
  never = _never(logits.shape[-1], forbidden, vocab_size)
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
    logits,
    ids[:, None],
    lengths[:, None],
    normalizers,
    never,
    blank_id,
    merge,
  )[:, 0]
  return {
    "ids": ids,
    "lengths": lengths,
    "path_log_prob": jnp.where(found, path_log_prob, NO_ANSWER),
    "log_prob": jnp.where(found, log_prob, NO_ANSWER),
  }


def _never(
  classes: int, forbidden: np.ndarray | None, vocab_size: int | None
) -> np.ndarray | None:
  """Returns bool [V], the classes that must not be predicted, if any."""
  size = classes if vocab_size is None else vocab_size
  if forbidden is None and size == classes:
    return None
  never = np.zeros(size, bool) if forbidden is None else forbidden
  return np.pad(never, (0, classes - size), constant_values=True)


def _masked(logits: jax.Array, never: np.ndarray | None) -> jax.Array:
  logits = logits.astype(jnp.float32)
  return logits if never is None else jnp.where(never, LOG_ZERO, logits)


def _masked_row(
  logits: jax.Array, query: jax.Array, never: np.ndarray | None
) -> jax.Array:
  """Returns the logits [B, V] of one query, out of [B, N, V]."""
  row = jax.lax.dynamic_index_in_dim(logits, query, -2, keepdims=False)
  return _masked(row, never)


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
  """Returns those over the allowed classes, [N, B, 1].

  One query at a time, so that no second array of the logits' size exists.
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
  """Sums the alignments of answers, all of them at once.

  `query_ctc_loss` takes one target for each example and always merges.

  Args:
    logits: [B, N, V].
    labels: int32 [B, C, L].
    lengths: int32 [B, C].
    normalizers: [N, B, 1].
    never: bool [V].
    blank_id: id of the CTC blank.
    merge_repeats: bool or bool [B].

  Returns:
    float32 [B, C].
  """
  b, c, size = labels.shape
  merge = jnp.broadcast_to(jnp.asarray(merge_repeats, bool), (b,))
  merge = merge[:, None, None]
  # A repeated label does not follow its like without a blank between.
  joined = jnp.pad(
    labels[..., 1:] == labels[..., :-1], ((0, 0), (0, 0), (1, 0))
  )
  joined &= merge

  def shift(x: jax.Array) -> jax.Array:
    """From the labels said so far to those before the next one."""
    return x[..., :-1]

  def step(
    alphas: tuple[jax.Array, jax.Array], query: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    # Both [B, C, L+1]: after l labels, the last query said blank or label l.
    blank, label = alphas
    row = _row(logits, query, normalizers, never)
    gathered = jax.vmap(lambda x, ids: x[ids])(row, labels)
    before = jnp.logaddexp(
      shift(blank), jnp.where(joined, LOG_ZERO, shift(label))
    )
    again = jnp.where(merge, label[..., 1:], LOG_ZERO)
    said = jnp.logaddexp(before, again) + gathered
    blank = jnp.logaddexp(blank, label) + row[:, blank_id, None, None]
    return (blank, label.at[..., 1:].set(said)), None

  nothing = jnp.full((b, c, size + 1), LOG_ZERO, jnp.float32)
  start = (nothing.at[..., 0].set(0.0), nothing)
  (blank, label), _ = jax.lax.scan(step, start, jnp.arange(logits.shape[1]))
  total = jnp.logaddexp(blank, label)
  return jnp.take_along_axis(total, lengths[..., None], axis=-1)[..., 0]
