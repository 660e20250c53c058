"""Beam search for an autoregressive decoder, in one compiled loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.decoding.constraint import START, Automaton, advance
from narvl_jax.decoding.rules import Rules, num_classes
from narvl_jax.errors import UserError

# (tokens int32 [B, K], t int32, cache) -> (logits [B, K, V], cache).
Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
# (cache, parents int32 [B, K]) -> cache.
Reorder = Callable[[Any, jax.Array], Any]


class _Search(NamedTuple):
  """State of the loop.

  Attributes:
    t: int32, decoder passes so far.
    cache: cache of the decoder.
    tokens: int32 [B, K, 1 + G], first token and generated tokens.
    log_probs: [B, K] of the hypotheses; -inf where there is none.
    states: int32 [B, K], states of the constraint.
    done: bool [B].
    count: int32 [B], number of finished hypotheses.
    ended_ids: int32 [B, K, G], hypotheses in the order in which they finished.
    ended_lengths: int32 [B, K], without eos.
    ended_log_probs: [B, K]; -inf where there is none.
  """

  t: jax.Array
  cache: Any
  tokens: jax.Array
  log_probs: jax.Array
  states: jax.Array
  done: jax.Array
  count: jax.Array
  ended_ids: jax.Array
  ended_lengths: jax.Array
  ended_log_probs: jax.Array


def beam_search(
  step: Step,
  reorder: Reorder,
  cache: Any,
  first_tokens: jax.Array,
  *,
  eos_id: int,
  pad_id: int,
  beam_size: int,
  length_limit: int,
  num_best: int = 1,
  min_length: int | jax.Array = 1,
  max_length: int | jax.Array | None = None,
  no_repeat_ngram: int = 0,
  normalize: bool = True,
  constraint: Automaton | None = None,
  vocab_size: int | None = None,
  forbidden: np.ndarray | jax.Array | None = None,
  alphabet: np.ndarray | None = None,
) -> dict[str, jax.Array]:
  """Returns the best answers that a beam search finds.

  The rules are those of fairseq. The 2 K most probable continuations of an
  example's K hypotheses are its candidates. Those among the first K that end
  in eos are finished; the best K that do not end in eos are continued. An
  example is done with its K-th finished hypothesis, or at `max_length`, where
  only eos is allowed. Beam size 1 is greedy search. Ties go to the hypothesis,
  then to the token, of the lowest index.

  Args:
    step: decoder pass. Its inputs are the last tokens [B, K], t and the cache,
      and returns the logits [B, K, V] of token t and the new cache. At t = 0
      the last tokens are `first_tokens`.
    reorder: returns the cache in which hypothesis k of an example continues
      its hypothesis parents[b, k]. Not called if K is 1.
    cache: any pytree of arrays. It contains the prompt without its last token,
      for each of the K hypotheses.
    first_tokens: int32 [B], the last tokens of the prompts, or bos. They count
      for `no_repeat_ngram`.
    eos_id: see `Rules`, also for all arguments that are not explained here.
    pad_id: also fills the tails of `ids`.
    beam_size: K.
    length_limit: G, room for the tokens of an answer; static.
    num_best: answers to return, at most K.
    min_length: int32 scalar or [B], least tokens without eos; lowered to
      `max_length` if it exceeds that. Like it, it may be traced, so that other
      lengths compile nothing.
    max_length: int32 scalar or [B], most tokens without eos, at most G; None
      for G.
    normalize: rank hypotheses by log-probability divided by the number of
      tokens, eos included, instead of by log-probability.
    constraint: if all its answers are longer than `max_length` or shorter than
      `min_length`, none is found.
    alphabet: see `Rules`. That of the constraint gives the same answers for
      less work.

  Returns:
    ids int32 [B, num_best, G] without eos, best first; lengths int32
    [B, num_best]; scores float32 [B, num_best], by which they are ranked;
    log_probs float32 [B, num_best], natural, eos included; steps int32 scalar,
    the number of decoder passes. If fewer answers than `num_best` are found,
    the rest have length 0, and score and log-probability -inf.

  Raises:
    UserError: `num_best` exceeds the beam, or the beam the vocabulary.

  Source: Ott et al. 2019 (fairseq), `sequence_generator.py`, as in OFA.
  """
  if num_best > beam_size:
    raise UserError(
      f"num_best={num_best} exceeds beam_size={beam_size};"
      f" nearest: {beam_size} (--num_best)"
    )
  batch = first_tokens.shape[:1]
  limit = length_limit if max_length is None else max_length
  longest = jnp.broadcast_to(jnp.minimum(limit, length_limit), batch)
  rules = Rules(
    eos_id=eos_id,
    pad_id=pad_id,
    min_length=jnp.minimum(min_length, longest),
    max_length=longest,
    no_repeat_ngram=no_repeat_ngram,
    constraint=constraint,
    vocab_size=vocab_size,
    forbidden=forbidden,
    alphabet=alphabet,
  )

  search = jax.lax.while_loop(
    lambda search: ~jnp.all(search.done),
    functools.partial(_decode, step=step, reorder=reorder, rules=rules),
    _start(first_tokens, cache, beam_size, length_limit, pad_id),
  )
  return _ranked(search, num_best, normalize)


def _decode(
  search: _Search, *, step: Step, reorder: Reorder, rules: Rules
) -> _Search:
  """Runs one decoder pass and selects the hypotheses that continue."""
  last = jax.lax.dynamic_index_in_dim(
    search.tokens, search.t, axis=2, keepdims=False
  )
  logits, cache = step(last, search.t, search.cache)
  beam_size = last.shape[1]
  _check_beam(beam_size, logits, rules)
  log_probs = rules.log_probs(logits, search.tokens, search.states, search.t)
  search, parents = _select(log_probs, search, rules)
  # With one hypothesis the order never changes.
  cache = cache if beam_size == 1 else reorder(cache, parents)
  return search._replace(cache=cache)


def _check_beam(beam_size: int, logits: jax.Array, rules: Rules) -> None:
  classes = num_classes(logits, rules.vocab_size, rules.alphabet)
  # Pad is a class, but never predicted.
  largest = (rules.vocab_size or classes) - 1
  if beam_size > largest:
    raise UserError(
      f"beam_size={beam_size} exceeds the {largest} tokens that the"
      f" vocabulary has besides pad; nearest: {largest} (--beam_size)"
    )


def _start(
  first_tokens: jax.Array,
  cache: Any,
  beam_size: int,
  length_limit: int,
  pad_id: int,
) -> _Search:
  """Returns the first state: one hypothesis, since all would be equal."""
  (batch,) = first_tokens.shape
  tokens = jnp.full((batch, beam_size, 1 + length_limit), pad_id, jnp.int32)
  tokens = tokens.at[..., 0].set(first_tokens[:, None])
  empty = jnp.full((batch, beam_size), -jnp.inf, jnp.float32)
  return _Search(
    t=jnp.int32(0),
    cache=cache,
    tokens=tokens,
    log_probs=empty.at[:, 0].set(0.0),
    states=jnp.full((batch, beam_size), START, jnp.int32),
    done=jnp.zeros(batch, bool),
    count=jnp.zeros(batch, jnp.int32),
    ended_ids=jnp.full((batch, beam_size, length_limit), pad_id, jnp.int32),
    ended_lengths=jnp.zeros((batch, beam_size), jnp.int32),
    ended_log_probs=empty,
  )


def _select(
  log_probs: jax.Array, search: _Search, rules: Rules
) -> tuple[_Search, jax.Array]:
  """Extends the hypotheses by one token.

  Args:
    log_probs: [B, K, V] of the next token.

  Returns:
    The state with its old cache, and parents int32 [B, K].
  """
  beam_size = log_probs.shape[1]
  totals = log_probs + search.log_probs[..., None]
  values, parents, tokens = _best(totals, 2 * beam_size)
  if rules.alphabet is not None:
    tokens = jnp.asarray(rules.alphabet)[tokens]
  is_eos = tokens == rules.eos_id
  search = _finish(search, values, parents, is_eos)
  # Stable, so that candidates stay ordered. At most K of the 2 K are eos, one
  # of each hypothesis, so that K are left.
  order = jnp.argsort(is_eos, axis=1, stable=True)[:, :beam_size]
  values, parents, tokens = (
    jnp.take_along_axis(x, order, axis=1) for x in (values, parents, tokens)
  )
  states = jnp.take_along_axis(search.states, parents, axis=1)
  if rules.constraint is not None:
    states = advance(rules.constraint, states, tokens)
  history = jnp.take_along_axis(search.tokens, parents[..., None], axis=1)
  done = search.done | (search.count >= beam_size)
  # Without a hypothesis nothing can follow.
  done |= (search.t >= rules.max_length) | jnp.all(values == -jnp.inf, axis=1)
  return search._replace(
    t=search.t + 1,
    # JAX drops an index out of range, which occurs once all examples are done.
    tokens=history.at[..., search.t + 1].set(tokens),
    log_probs=values,
    states=states,
    done=done,
  ), parents


def _best(
  totals: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns values, hypotheses and tokens [B, count] of the largest totals."""
  batch, beam_size, classes = totals.shape
  # The largest totals are among the largest of each hypothesis.
  each = min(count, classes)
  values, tokens = jax.lax.top_k(totals, each)
  values, places = jax.lax.top_k(values.reshape(batch, -1), count)
  tokens = jnp.take_along_axis(
    tokens.reshape(batch, beam_size * each), places, axis=1
  )
  return values, places // each, tokens


def _finish(
  search: _Search, values: jax.Array, parents: jax.Array, is_eos: jax.Array
) -> _Search:
  """Stores those of the first K candidates [B, 2 K] that end in eos.

  An example that is done does not change: it has no room or no hypothesis.
  """
  batch, beam_size, _ = search.tokens.shape
  values, parents = values[:, :beam_size], parents[:, :beam_size]
  ends = is_eos[:, :beam_size] & (values > -jnp.inf)
  place = search.count[:, None] + jnp.cumsum(ends, axis=1) - 1
  # Place K is out of range, so that the entry is dropped.
  place = jnp.where(ends, place, beam_size)
  row = jnp.arange(batch)[:, None]
  ids = jnp.take_along_axis(search.tokens, parents[..., None], axis=1)[..., 1:]
  return search._replace(
    count=search.count + jnp.sum(ends, axis=1, dtype=jnp.int32),
    ended_ids=search.ended_ids.at[row, place].set(ids, mode="drop"),
    ended_lengths=search.ended_lengths.at[row, place].set(
      search.t, mode="drop"
    ),
    ended_log_probs=search.ended_log_probs.at[row, place].set(
      values, mode="drop"
    ),
  )


def _ranked(
  search: _Search, num_best: int, normalize: bool
) -> dict[str, jax.Array]:
  """Returns the finished hypotheses, best first, ties in order of finishing."""
  scores = search.ended_log_probs
  if normalize:
    scores /= search.ended_lengths + 1
  order = jnp.argsort(-scores, axis=1, stable=True)[:, :num_best]

  def pick(x: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, order, axis=1)

  return {
    "ids": jnp.take_along_axis(search.ended_ids, order[..., None], axis=1),
    "lengths": pick(search.ended_lengths),
    "scores": pick(scores),
    "log_probs": pick(search.ended_log_probs),
    "steps": search.t,
  }
