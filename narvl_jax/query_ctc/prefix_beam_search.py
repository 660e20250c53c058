"""Prefix beam search: the likeliest label sequences, not alignments.

Letters: k hypotheses, n queries, c extensions of a hypothesis, v classes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from narvl_jax.errors import UserError
from narvl_jax.query_ctc.automaton import (
  LabelAutomaton,
  QueriesNeeded,
  as_arrays,
  queries_needed,
)
from narvl_jax.query_ctc.log_space import LOG_ZERO, show_no_answer

# Classes beyond the best 32 of a query hold next to nothing of a trained
# model's probability.
_CANDIDATES = 32


class _Beam(NamedTuple):
  """The hypotheses of one example; no two live ones are the same prefix.

  Attributes:
    ids: int32 [K, N] labels, left packed.
    lengths: int32 [K].
    blank: float32 [K] log-probability of the alignments that end in blank.
    label: float32 [K] of those that end in the last label.
    state: int32 [K] where the prefix leads in the automaton.
  """

  ids: jax.Array
  lengths: jax.Array
  blank: jax.Array
  label: jax.Array
  state: jax.Array

  @property
  def total(self) -> jax.Array:
    return jnp.logaddexp(self.blank, self.label)

  @property
  def last(self) -> jax.Array:
    """int32 [K] the last label, -1 if there is none."""
    at = jnp.maximum(self.lengths - 1, 0)[:, None]
    last = jnp.take_along_axis(self.ids, at, axis=1)[:, 0]
    return jnp.where(self.lengths > 0, last, -1)


class _Extensions(NamedTuple):
  """What may follow at one query.

  Attributes:
    tokens: int32 [C].
    log_probs: float32 [C].
    allowed: bool [K, C].
    target: int32 [C] state that is entered.
  """

  tokens: jax.Array
  log_probs: jax.Array
  allowed: jax.Array
  target: jax.Array


def prefix_beam_search(
  log_probs: jax.Array,
  *,
  blank_id: int,
  pad_id: int,
  beam_size: int,
  num_best: int = 1,
  merge_repeats: bool | jax.Array = True,
  constraint: LabelAutomaton | None = None,
  candidates_per_query: int | None = _CANDIDATES,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the label sequences of the highest probability.

  The probability of a sequence is the sum over its alignments. After every
  query the `beam_size` likeliest prefixes are kept, and what reaches one and
  the same prefix in different ways is added up. With a large enough beam, and
  all candidates, the result is exact; otherwise a score is what the beam kept
  of the sum, never more than the truth.

  Where repeats are not merged every query that does not say blank is a label
  of its own: "a a" needs no blank between, and the sum is over the places of
  the blanks alone.

  With a constraint, prefixes which cannot be completed with the queries left
  are dropped, so that even a narrow beam ends in an answer if there is one.
  eos is a label like any other here: if targets were trained with it, the
  constraint must hold it.

  Works under `jit` and `vmap` for any shapes; the classes must not be split
  over devices.

  Args:
    log_probs: float [B, N, V], normalised, of any magnitude. -inf is allowed:
      what has probability zero is never an answer. NaN in an example makes its
      scores NaN and its lengths 0.
    blank_id: id of the blank class.
    pad_id: never a label; fills the tail of `ids`.
    beam_size: prefixes that are kept.
    num_best: sequences that are returned.
    merge_repeats: bool for all examples or bool [B].
    constraint: sequences that are allowed; None allows all.
    candidates_per_query: without a constraint: only so many of the likeliest
      labels of a query begin a new prefix there, None: all. What lengthens the
      alignment of a prefix, or leads to one that is kept already, always
      counts. With a constraint: not used, all that it allows are considered.

  Returns:
    ids int32 [B, num_best, N], lengths int32 [B, num_best] and scores float32
    [B, num_best], natural logarithms, best first. A place for which there is
    no sequence has length 0 and the score -1e9, or less if the score of a
    sequence is: it is below all of them.

  Raises:
    UserError: a size is out of range, or there is no query.

  Source: Graves et al. 2006, section 3.2; Hannun et al. 2014 (1408.2873).
  """
  b, n, v = log_probs.shape
  _check(beam_size, num_best, candidates_per_query)
  if n < 1:
    raise UserError(
      f"log-probabilities {log_probs.shape} have no query; set"
      " --config.model.num_queries to at least 1"
    )
  log_probs = log_probs.astype(jnp.float32)
  # Comparisons with NaN would drop it somewhere in the search.
  is_number = ~jnp.any(jnp.isnan(log_probs), axis=(1, 2))
  merge = jnp.broadcast_to(jnp.asarray(merge_repeats, bool), (b,))
  search = functools.partial(
    _search, blank_id=blank_id, beam_size=beam_size, constraint=constraint
  )
  if constraint is not None:
    both = jax.vmap(lambda m: queries_needed(constraint, m, n))(
      jnp.array([False, True])
    )
    needed = jax.tree.map(lambda x: x[merge.astype(jnp.int32)], both)
    beam = jax.vmap(search)(log_probs, merge, None, needed)
  else:
    count = v if candidates_per_query is None else candidates_per_query
    best = _best_labels(log_probs, count, (blank_id, pad_id))
    beam = jax.vmap(search)(log_probs, merge, best, None)
  ids, lengths, scores = _results(beam, num_best, pad_id, constraint)
  is_number = is_number[:, None]
  return (
    jnp.where(is_number[..., None], ids, pad_id),
    jnp.where(is_number, lengths, 0),
    jnp.where(is_number, scores, jnp.nan),
  )


def _check(
  beam_size: int, num_best: int, candidates_per_query: int | None
) -> None:
  for name, value in (
    ("beam_size", beam_size),
    ("num_best", num_best),
    ("candidates_per_query", candidates_per_query),
  ):
    if value is not None and value < 1:
      raise UserError(f"{name} is {value}; nearest: 1 (--{name})")
  if num_best > beam_size:
    raise UserError(
      f"num_best is {num_best}, but the beam holds {beam_size} prefixes;"
      f" nearest: {beam_size} (--num_best)"
    )


def _best_labels(
  log_probs: jax.Array, count: int, excluded: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the likeliest labels of every query.

  Args:
    log_probs: [B, N, V].
    count: how many are wanted.
    excluded: classes that are no labels.

  Returns:
    Classes int32 and their log-probabilities [B, N, C], and bool [B, N, C],
    which of them count.
  """
  # Taking more and dropping some spares a copy of all log-probabilities.
  size = min(count + len(excluded), log_probs.shape[-1])
  values, ids = jax.lax.top_k(log_probs, size)
  labels = jnp.all(ids[..., None] != jnp.asarray(excluded), axis=-1)
  return ids, values, labels & (jnp.cumsum(labels, axis=-1) <= count)


def _search(
  log_probs: jax.Array,
  merge: jax.Array,
  best: tuple[jax.Array, jax.Array, jax.Array] | None,
  needed: QueriesNeeded | None,
  *,
  blank_id: int,
  beam_size: int,
  constraint: LabelAutomaton | None,
) -> _Beam:
  """Returns the last beam of one example.

  Args:
    log_probs: [N, V].
    merge: bool scalar.
    best: see `_best_labels`, without the batch; only without a constraint.
    needed: by the constraint.
    blank_id: id of the blank class.
    beam_size: K.
    constraint: sequences that are allowed.
  """
  n = log_probs.shape[0]

  def step(beam: _Beam, query: jax.Array) -> tuple[_Beam, None]:
    row = jax.lax.dynamic_index_in_dim(log_probs, query, keepdims=False)
    possible = jnp.ones(beam_size, bool)
    if constraint is None:
      assert best is not None
      tokens, values, labels = (x[query] for x in best)
      allowed = jnp.broadcast_to(labels, (beam_size, len(labels)))
      extensions = _Extensions(tokens, values, allowed, jnp.zeros_like(tokens))
    else:
      assert needed is not None
      source, token, target, _ = as_arrays(constraint)
      left = n - 1 - query
      allowed = (source == beam.state[:, None]) & (needed.after_edge <= left)
      extensions = _Extensions(token, row[token], allowed, target)
      possible = needed.from_state[beam.state] <= left
    return _advance(beam, row, extensions, possible, merge, blank_id), None

  start = _Beam(
    ids=jnp.zeros((beam_size, n), jnp.int32),
    lengths=jnp.zeros(beam_size, jnp.int32),
    blank=jnp.full(beam_size, LOG_ZERO, jnp.float32).at[0].set(0.0),
    label=jnp.full(beam_size, LOG_ZERO, jnp.float32),
    state=jnp.zeros(beam_size, jnp.int32),
  )
  beam, _ = jax.lax.scan(step, start, jnp.arange(n))
  return beam


def _advance(
  beam: _Beam,
  row: jax.Array,
  extensions: _Extensions,
  possible: jax.Array,
  merge: jax.Array,
  blank_id: int,
) -> _Beam:
  """Returns the beam after one more query.

  Args:
    beam: the beam before it.
    row: float32 [V] log-probabilities of the query.
    extensions: labels that may follow.
    possible: bool [K], whether a prefix may stay as it is.
    merge: bool scalar, whether repeats are merged.
    blank_id: id of the blank class.
  """
  k, c = extensions.allowed.shape
  total, last, tokens = beam.total, beam.last, extensions.tokens
  # A repeat is a new label only after a blank.
  repeats = merge & (last[:, None] == tokens)
  extended = jnp.where(repeats, beam.blank[:, None], total[:, None])
  extended += extensions.log_probs
  # [K, K]: hypothesis j is hypothesis i and one label more.
  child = _is_child(beam)
  known = jnp.any(child[:, :, None] & (last[None, :, None] == tokens), axis=1)
  extended = jnp.where(extensions.allowed & ~known, extended, LOG_ZERO)
  into = jnp.where(
    merge & (last[:, None] == last), beam.blank[:, None], total[:, None]
  )
  into = jnp.max(jnp.where(child, into, LOG_ZERO), axis=0)
  own = jnp.where(merge & (beam.lengths > 0), beam.label, LOG_ZERO)
  blank = total + row[blank_id]
  label = jnp.logaddexp(own, into) + row[last]
  stay = jnp.where(possible, jnp.logaddexp(blank, label), LOG_ZERO)
  score, chosen = jax.lax.top_k(jnp.concatenate([stay, extended.ravel()]), k)

  longer = chosen >= k
  which = jnp.maximum(chosen - k, 0)
  parent = jnp.where(longer, which // c, chosen)
  which %= c
  at_end = jnp.arange(beam.ids.shape[1]) == beam.lengths[parent][:, None]
  ids = beam.ids[parent]
  return _Beam(
    ids=jnp.where(longer[:, None] & at_end, tokens[which][:, None], ids),
    lengths=beam.lengths[parent] + longer,
    blank=jnp.where(longer, LOG_ZERO, blank[parent]),
    label=jnp.where(longer, score, label[parent]),
    state=jnp.where(longer, extensions.target[which], beam.state[parent]),
  )


def _is_child(beam: _Beam) -> jax.Array:
  """Returns bool [K, K]: [i, j] is true if j is i and one label more."""
  place = jnp.arange(beam.ids.shape[1])
  equal = beam.ids[:, None] == beam.ids[None, :]
  outside = place >= beam.lengths[:, None, None]
  alive = beam.total > LOG_ZERO
  return (
    jnp.all(equal | outside, axis=-1)
    & (beam.lengths[:, None] + 1 == beam.lengths)
    & alive[:, None]
    & alive
  )


def _results(
  beam: _Beam, num_best: int, pad_id: int, constraint: LabelAutomaton | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns ids, lengths and scores of the best; beam with batch axis."""
  scores = beam.total
  if constraint is not None:
    *_, accepting = as_arrays(constraint)
    scores = jnp.where(accepting[beam.state], scores, LOG_ZERO)
  scores, order = jax.lax.top_k(scores, num_best)
  found = scores > LOG_ZERO
  lengths = jnp.take_along_axis(beam.lengths, order, axis=1)
  lengths = jnp.where(found, lengths, 0)
  ids = jnp.take_along_axis(beam.ids, order[..., None], axis=1)
  tail = jnp.arange(ids.shape[-1]) >= lengths[..., None]
  ids = jnp.where(tail, pad_id, ids)
  return ids, lengths, show_no_answer(scores)
