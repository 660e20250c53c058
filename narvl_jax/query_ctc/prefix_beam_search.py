"""Prefix beam search: the likeliest label sequences, not alignments.

Letters: K hypotheses, N queries, C extensions of a hypothesis, V classes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from narvl_jax.errors import UserError
from narvl_jax.query_ctc.automaton import (
  Automaton,
  QueriesNeeded,
  as_arrays,
  queries_needed,
)
from narvl_jax.query_ctc.log_space import LOG_ZERO, show_no_answer

# A trained model gives nearly all probability to the best 32 classes.
_CANDIDATES = 32


class _Beam(NamedTuple):
  """The hypotheses of one example; no two live ones are the same prefix.

  Attributes:
    ids: int32 [K, N] labels, left packed.
    lengths: int32 [K].
    blank: float32 [K] log-probability of the alignments that end in blank.
    label: float32 [K] of those that end in the last label.
    state: int32 [K] state of the automaton.
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
  """Labels that may extend the hypotheses at one query.

  Attributes:
    tokens: int32 [C].
    log_probs: float32 [C].
    allowed: bool [K, C].
    target: int32 [C] next state of the automaton.
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
  constraint: Automaton | None = None,
  candidates_per_query: int | None = _CANDIDATES,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the label sequences of the highest probability.

  The probability of a sequence is the sum over its alignments. After every
  query the `beam_size` likeliest prefixes are kept, and the probabilities of
  all ways to the same prefix are summed. With all candidates and a large
  enough beam the result is exact. Otherwise a score lacks the alignments that
  the beam dropped, and is a lower bound.

  Where repeats are not merged, every query that does not emit blank emits a
  label of its own: "a a" needs no blank between, and alignments differ only in
  the places of the blanks.

  With a constraint, prefixes that the remaining queries cannot complete are
  dropped, so that even a narrow beam finds an answer if there is one. eos is
  an ordinary label: if targets were trained with it, the constraint must
  contain it.

  Works under `jit` and `vmap`; the classes must not be split over devices.

  Args:
    log_probs: float [B, N, V], normalised, of any magnitude. Sequences with a
      log-probability of -inf are never returned. NaN in an example makes its
      scores NaN and its lengths 0.
    blank_id: id of the blank class.
    pad_id: never a label; fills the tail of `ids`.
    beam_size: number of prefixes that are kept.
    num_best: number of sequences that are returned.
    merge_repeats: bool for all examples or bool [B].
    constraint: allowed sequences, None for all.
    candidates_per_query: number of likeliest labels of a query that may begin
      a new prefix there, None for all. Labels that extend an alignment of a
      prefix, or lead to a prefix in the beam, always count. Ignored with a
      constraint, which considers all labels that it allows.

  Returns:
    ids int32 [B, num_best, N], lengths int32 [B, num_best] and scores float32
    [B, num_best], natural logarithms, best first. If there are fewer
    sequences, the rest have length 0 and a score of at most -1e9 that is below
    all others.

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
  # The search would drop NaN, since comparisons with it are false.
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
      f"num_best is {num_best}, but the beam contains {beam_size} prefixes;"
      f" nearest: {beam_size} (--num_best)"
    )


def _best_labels(
  log_probs: jax.Array, count: int, excluded: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the likeliest labels of every query.

  Args:
    log_probs: [B, N, V].
    count: number of labels.
    excluded: classes that are not labels.

  Returns:
    Classes int32 [B, N, C], their log-probabilities, and the mask bool
    [B, N, C] of those that are among the likeliest labels.
  """
  # Masking a few more results avoids a masked copy of all log-probabilities.
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
  constraint: Automaton | None,
) -> _Beam:
  """Returns the last beam of one example.

  Args:
    log_probs: [N, V].
    merge: bool scalar.
    best: result of `_best_labels` for this example; None with a constraint.
    needed: queries that the constraint needs; None without one.
    beam_size: K.
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
    possible: bool [K], whether a prefix may stay without a new label.
    merge: bool scalar, whether repeats are merged.
  """
  k, c = extensions.allowed.shape
  total, last, tokens = beam.total, beam.last, extensions.tokens
  # Where repeats are merged, an equal label is a new one only after a blank.
  repeats = merge & (last[:, None] == tokens)
  extended = jnp.where(repeats, beam.blank[:, None], total[:, None])
  extended += extensions.log_probs
  # An extension that is in the beam adds to that hypothesis instead.
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
  """Returns bool [K, K], True at [i, j] if j extends i by one label."""
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
  beam: _Beam, num_best: int, pad_id: int, constraint: Automaton | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns ids, lengths and scores of the best; the beam is batched."""
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
