"""Scores of all answers of a closed set under an autoregressive decoder."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.decoding.constraint import (
  START,
  Automaton,
  advance,
  allowed_tokens,
)
from narvl_jax.decoding.rules import allowed_classes, num_classes
from narvl_jax.errors import UserError
from narvl_jax.query_ctc.log_space import normalizer

# (tokens int32 [B, C', L + 1], cache) -> logits [B, C', L + 1, V].
Extend = Callable[[jax.Array, Any], jax.Array]


def score_candidates(
  extend: Extend,
  cache: Any,
  first_tokens: jax.Array,
  candidates: np.ndarray | jax.Array,
  lengths: np.ndarray | jax.Array,
  *,
  eos_id: int,
  group_size: int,
  constraint: Automaton | None = None,
  vocab_size: int | None = None,
  forbidden: np.ndarray | jax.Array | None = None,
  alphabet: np.ndarray | None = None,
) -> jax.Array:
  """Returns the log-probabilities float32 [B, C] of the candidates.

  It is the sum over an answer's tokens and eos, not divided by their number.
  Groups of candidates follow one another, so that logits of one group alone
  are held.

  Args:
    extend: decoder pass that is told what is said; given the last token of the
      prompt and a candidate after it, and the cache, returns the logits of
      what comes after each of them.
    cache: any pytree of arrays; holds the prompt but for its last token, for
      every example or every one of C' = group_size candidates.
    first_tokens: int32 [B], the last tokens of the prompts, or bos.
    candidates: int32 [C, L] without eos; what fills the tails is not scored.
    lengths: int32 [C].
    eos_id: ends an answer.
    group_size: candidates that are scored at a time.
    constraint: only its tokens share the probability at each place, and a
      candidate that is none of its answers has log-probability -inf. None: all
      tokens share it.
    vocab_size: number of true classes, those after it are padding of the
      table; None for all V.
    forbidden: bool [vocab_size], classes that must not be said.
    alphabet: int32 [U], ascending, given with `vocab_size`: the logits are
      [B, C', L + 1, U], of these tokens. That of the constraint gives the same
      scores for less work. None: of all tokens.

  Raises:
    UserError: there are no candidates, or groups of none.
  """
  if not len(candidates):
    raise UserError("there are no answers to score; give at least one")
  if group_size < 1:
    raise UserError(
      f"candidates are scored group_size={group_size} at a time; nearest: 1"
    )
  groups = -(-len(candidates) // group_size)
  spare = groups * group_size - len(candidates)
  ids = jnp.pad(jnp.asarray(candidates), ((0, spare), (0, 0)), mode="edge")
  ends = jnp.pad(jnp.asarray(lengths), (0, spare), mode="edge")

  def score(group: tuple[jax.Array, jax.Array]) -> jax.Array:
    said, ends = group
    # [C', L + 1], candidate and eos.
    targets = jnp.pad(said, ((0, 0), (0, 1)))
    places = jnp.arange(targets.shape[1])
    targets = jnp.where(places == ends[:, None], eos_id, targets)
    logits = extend(_after(first_tokens, said), cache).astype(jnp.float32)
    classes = num_classes(logits, vocab_size, alphabet)
    allowed = allowed_classes(classes, vocab_size, forbidden)
    if constraint is not None:
      states = _walk(constraint, said)
      allowed &= allowed_tokens(constraint, states, classes, eos_id)
    if alphabet is None:
      log_probs = _log_probs(logits, targets, allowed)
    else:
      letters = jnp.asarray(alphabet)
      index = jnp.minimum(jnp.searchsorted(letters, targets), len(letters) - 1)
      log_probs = _log_probs(logits, index, allowed[..., letters])
      known = letters[index] == targets
      log_probs = jnp.where(known, log_probs, -jnp.inf)
    return jnp.sum(jnp.where(places <= ends[:, None], log_probs, 0.0), axis=-1)

  scores = jax.lax.map(
    score,
    (
      ids.reshape(groups, group_size, ids.shape[1]),
      ends.reshape(groups, group_size),
    ),
  )
  # [groups, B, C'].
  scores = jnp.moveaxis(scores, 1, 0).reshape(len(first_tokens), -1)
  return scores[:, : len(candidates)]


def _after(first_tokens: jax.Array, said: jax.Array) -> jax.Array:
  """Returns int32 [B, C', L + 1], first tokens [B] before said [C', L]."""
  batch, (count, length) = len(first_tokens), said.shape
  first = jnp.broadcast_to(first_tokens[:, None, None], (batch, count, 1))
  said = jnp.broadcast_to(said, (batch, count, length))
  return jnp.concatenate([first.astype(said.dtype), said], axis=-1)


def _walk(automaton: Automaton, said: jax.Array) -> jax.Array:
  """Returns the states int32 [C', L + 1] before and after each token."""

  def go(states: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    states = advance(automaton, states, tokens)
    return states, states

  start = jnp.full(len(said), START, jnp.int32)
  _, states = jax.lax.scan(go, start, said.T)
  return jnp.concatenate([start[:, None], states.T], axis=1)


def _log_probs(
  logits: jax.Array, targets: jax.Array, allowed: jax.Array
) -> jax.Array:
  """Returns log-probabilities [B, C', L + 1] of targets int32 [C', L + 1].

  Args:
    logits: float32 [B, C', L + 1, V].
    targets: what is scored.
    allowed: bool [C', L + 1, V] or [V], classes that share the probability; a
      target that is none of them has -inf.
  """
  total = normalizer(jnp.where(allowed, logits, -jnp.inf))
  index = jnp.broadcast_to(targets, total.shift.shape)[..., None]
  values = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
  possible = jnp.take_along_axis(
    jnp.broadcast_to(allowed, (*targets.shape, logits.shape[-1])),
    targets[..., None],
    axis=-1,
  )[..., 0]
  # Not a number where nothing is allowed.
  return jnp.where(possible, total.log_probs(values), -jnp.inf)
