"""Constraints on answers, as finite automata over tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.query_ctc.automaton import START, Automaton


def answer_trie(answers: Sequence[Sequence[int]]) -> Automaton:
  """Returns the automaton that allows exactly these token sequences.

  Raises:
    UserError: there is no answer, or one is empty.
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
    tokens: ids that are allowed at every place.
    then: ids that must follow, such as eos.

  Raises:
    UserError: there are no tokens or no places.
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
  """Returns eos and the tokens of all answers, int32 [U], ascending.

  No logits of other tokens are needed.
  """
  tokens = np.append(np.asarray(automaton.token), eos_id)
  return np.unique(tokens).astype(np.int32)


def leaving(automaton: Automaton, states: jax.Array) -> jax.Array:
  """Returns the mask bool [..., E] of edges that leave states [...]."""
  return jnp.asarray(automaton.source) == states[..., None]


def allowed_tokens(
  automaton: Automaton, states: jax.Array, vocab_size: int, eos_id: int | None
) -> jax.Array:
  """Returns the mask bool [..., V] of tokens that may follow.

  Args:
    states: int32 [...], current states.
    vocab_size: V.
    eos_id: allowed where an answer may end; None if no token ends an answer.
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
  """Returns states [...] after tokens int32 [...]; unchanged if forbidden."""
  edges = leaving(automaton, states)
  edges &= jnp.asarray(automaton.token) == tokens[..., None]
  # At most one edge is left.
  target = jnp.max(jnp.where(edges, automaton.target, -1), axis=-1)
  return jnp.where(target >= 0, target, states)
