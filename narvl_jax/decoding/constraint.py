"""Which answers are allowed: a finite automaton over tokens, on device."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.errors import UserError

# Every walk begins here.
START = 0


class Automaton(NamedTuple):
  """A deterministic automaton; its paths to accepting states are answers.

  A trie of answers is one, and so is "exactly four coordinates". It is a list
  of edges, for a table of states by tokens would not fit for thousands of
  answers over tens of thousands of tokens.

  Attributes:
    source: int32 [E] state that an edge leaves.
    token: int32 [E] token that it takes; no two edges of a state share one.
    target: int32 [E] state that it enters.
    accepting: bool [S] states in which an answer may end.
  """

  source: np.ndarray | jax.Array
  token: np.ndarray | jax.Array
  target: np.ndarray | jax.Array
  accepting: np.ndarray | jax.Array


def answer_trie(answers: Sequence[Sequence[int]]) -> Automaton:
  """Returns the automaton that allows just these token sequences.

  Raises:
    UserError: there is none, or one is empty.
  """
  if not answers:
    raise UserError("the constraint allows no answer at all; give at least one")
  children: list[dict[int, int]] = [{}]
  accepting: set[int] = set()
  for number, answer in enumerate(answers):
    if not len(answer):
      raise UserError(f"answer {number} of the constraint has no token")
    state = START
    for token in answer:
      if token not in children[state]:
        children[state][token] = len(children)
        children.append({})
      state = children[state][token]
    accepting.add(state)
  edges = [
    (state, token, target)
    for state, row in enumerate(children)
    for token, target in sorted(row.items())
  ]
  ends = np.zeros(len(children), bool)
  ends[list(accepting)] = True
  return Automaton(*np.asarray(edges, np.int32).T, accepting=ends)


def repeated(
  tokens: Sequence[int], count: int, then: Sequence[int] = ()
) -> Automaton:
  """Returns the automaton of `count` free choices among `tokens`.

  Args:
    tokens: ids, each allowed at each of the places.
    count: number of places.
    then: ids that must follow, such as eos.

  Raises:
    UserError: there are no tokens or places.
  """
  if not len(tokens) or count < 1:
    raise UserError(
      f"the constraint allows no answer at all: {count} places for"
      f" {len(tokens)} tokens; both must be at least 1"
    )
  edges = [(s, t, s + 1) for s in range(count) for t in sorted(set(tokens))]
  edges += [(count + i, t, count + i + 1) for i, t in enumerate(then)]
  ends = np.zeros(count + len(then) + 1, bool)
  ends[-1] = True
  return Automaton(*np.asarray(edges, np.int32).T, accepting=ends)


def alphabet(automaton: Automaton, eos_id: int) -> np.ndarray:
  """Returns int32 [U], sorted: eos and the tokens that an answer may hold.

  Logits of other tokens need not be computed.
  """
  tokens = np.append(np.asarray(automaton.token), eos_id)
  return np.unique(tokens).astype(np.int32)


def leaving(automaton: Automaton, states: jax.Array) -> jax.Array:
  """Returns bool [..., E], the edges that leave states int32 [...]."""
  return jnp.asarray(automaton.source) == states[..., None]


def allowed_tokens(
  automaton: Automaton, states: jax.Array, vocab_size: int, eos_id: int | None
) -> jax.Array:
  """Returns bool [..., V], the tokens that may follow in states int32 [...].

  Args:
    automaton: the constraint.
    states: where the walks stand.
    vocab_size: V.
    eos_id: allowed where an answer may end; None: no token ends an answer.
  """
  edges = leaving(automaton, states)
  mask = jnp.zeros((*states.shape, vocab_size), bool)
  mask = mask.at[..., jnp.asarray(automaton.token)].max(edges)
  if eos_id is not None:
    ends = jnp.asarray(automaton.accepting)[states]
    mask = mask.at[..., eos_id].max(ends)
  return mask


def advance(
  automaton: Automaton, states: jax.Array, tokens: jax.Array
) -> jax.Array:
  """Returns the states after tokens int32 [...]; same state if not allowed."""
  edges = leaving(automaton, states)
  edges &= jnp.asarray(automaton.token) == tokens[..., None]
  # At most one edge is left.
  target = jnp.max(jnp.where(edges, automaton.target, -1), axis=-1)
  return jnp.where(target >= 0, target, states)
