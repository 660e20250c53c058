"""Scores of a closed set of answers under an autoregressive decoder."""

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

  A log-probability is the sum over the tokens of an answer and eos, not divided
  by their number. Groups of candidates are scored one after another, so that
  only the logits of one group exist at a time.

  Args:
    extend: decoder pass with teacher forcing. It takes the last token of the
      prompt followed by the candidate, and the cache, and returns the logits
      of the token after each of them.
    cache: any pytree of arrays. It contains the prompt without its last token,
      for every example or for each of C' = group_size candidates.
    first_tokens: int32 [B], the last tokens of the prompts, or bos.
    candidates: int32 [C, L] without eos; padding is not scored.
    lengths: int32 [C].
    eos_id: ends an answer.
    constraint: the probability at each place is normalised over the tokens that
      it allows; a candidate that is not among its answers has log-probability
      -inf. None allows all tokens.
    vocab_size: see `rules.Rules`.
    forbidden: see `rules.Rules`.
    alphabet: see `rules.Rules`. That of the constraint gives the same scores
      for less work.

  Raises:
    UserError: there are no candidates, or the group size is below 1.
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
    answers, ends = group
    # [C', L + 1], candidate and eos.
    targets = jnp.pad(answers, ((0, 0), (0, 1)))
    places = jnp.arange(targets.shape[1])
    targets = jnp.where(places == ends[:, None], eos_id, targets)
    logits = extend(_after(first_tokens, answers), cache).astype(jnp.float32)
    classes = num_classes(logits, vocab_size, alphabet)
    allowed = allowed_classes(classes, vocab_size, forbidden)
    if constraint is not None:
      states = _walk(constraint, answers)
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


def _after(first_tokens: jax.Array, answers: jax.Array) -> jax.Array:
  """Returns int32 [B, C', L + 1]: first tokens [B], then `answers` [C', L]."""
  batch, (count, length) = len(first_tokens), answers.shape
  first = jnp.broadcast_to(first_tokens[:, None, None], (batch, count, 1))
  answers = jnp.broadcast_to(answers, (batch, count, length))
  return jnp.concatenate([first.astype(answers.dtype), answers], axis=-1)


def _walk(automaton: Automaton, answers: jax.Array) -> jax.Array:
  """Returns the states int32 [C', L + 1] before and after each token."""

  def go(states: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    states = advance(automaton, states, tokens)
    return states, states

  start = jnp.full(len(answers), START, jnp.int32)
  _, states = jax.lax.scan(go, start, answers.T)
  return jnp.concatenate([start[:, None], states.T], axis=1)


def _log_probs(
  logits: jax.Array, targets: jax.Array, allowed: jax.Array
) -> jax.Array:
  """Returns log-probabilities [B, C', L + 1] of the targets.

  Args:
    logits: float32 [B, C', L + 1, V].
    targets: int32 [C', L + 1].
    allowed: bool [C', L + 1, V] or [V], classes over which to normalise; other
      targets have log-probability -inf.
  """
  total = normalizer(jnp.where(allowed, logits, -jnp.inf))
  index = jnp.broadcast_to(targets, total.shift.shape)[..., None]
  values = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
  possible = jnp.take_along_axis(
    jnp.broadcast_to(allowed, (*targets.shape, logits.shape[-1])),
    targets[..., None],
    axis=-1,
  )[..., 0]
  # The log-probability is NaN where nothing is allowed.
  return jnp.where(possible, total.log_probs(values), -jnp.inf)
