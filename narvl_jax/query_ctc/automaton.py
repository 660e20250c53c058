"""Finite automata over labels, and how many queries their answers need."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# State in which every walk begins.
START = 0
# More queries than any model has; sums of a few do not overflow int32.
UNREACHABLE = 1 << 20


class Automaton(NamedTuple):
  """A deterministic automaton; its paths to accepting states are answers.

  Examples are a trie of answers, and "exactly four coordinates". It is stored
  as a list of E edges: a table of states by tokens would be too large for
  thousands of answers over tens of thousands of tokens.

  Attributes:
    source: int32 [E] state that an edge leaves.
    token: int32 [E] its label; the edges that leave a state differ in it.
    target: int32 [E] state that it enters.
    accepting: bool [S] states in which an answer may end.
  """

  source: np.ndarray | jax.Array
  token: np.ndarray | jax.Array
  target: np.ndarray | jax.Array
  accepting: np.ndarray | jax.Array


class QueriesNeeded(NamedTuple):
  """Least number of further queries that complete an answer.

  Attributes:
    from_state: int32 [S], if the last query emitted blank or there was none.
    after_edge: int32 [E], if the last query emitted the label of the edge.
      Where repeats are merged, an equal label needs a blank before it.
  """

  from_state: jax.Array
  after_edge: jax.Array


def queries_needed(
  automaton: Automaton, merge_repeats: Any, num_queries: int
) -> QueriesNeeded:
  """Returns how many queries the rest of an answer needs.

  Args:
    automaton: automaton with E edges and S states.
    merge_repeats: bool scalar.
    num_queries: up to this number the result is exact; above it is some larger
      number, at most `UNREACHABLE`.
  """
  source, token, target, accepting = as_arrays(automaton)
  states = accepting.shape[0]
  edges = token.shape[0]
  order = jnp.arange(edges, dtype=jnp.int32)
  never = jnp.full(states, UNREACHABLE, jnp.int32)

  def least(values: jax.Array) -> jax.Array:
    """Returns the minimum over the edges that leave each state."""
    return never.at[source].min(values)

  def step(_: Any, after: jax.Array) -> jax.Array:
    cost = jnp.minimum(after + 1, UNREACHABLE)
    first = least(cost)
    is_first = cost == first[source]
    winner = jnp.full(states, edges, jnp.int32)
    winner = winner.at[source].min(jnp.where(is_first, order, edges))
    second = least(jnp.where(order == winner[source], UNREACHABLE, cost))
    winner_token = token.at[winner[target]].get(mode="fill", fill_value=-1)
    repeats = (winner_token == token) & merge_repeats
    onward = jnp.where(
      repeats, jnp.minimum(first[target] + 1, second[target]), first[target]
    )
    return jnp.where(accepting[target], 0, jnp.minimum(onward, UNREACHABLE))

  start = jnp.full(token.shape, UNREACHABLE, jnp.int32)
  after = jax.lax.fori_loop(0, num_queries, step, start)
  before = jnp.where(accepting, 0, least(jnp.minimum(after + 1, UNREACHABLE)))
  return QueriesNeeded(before, after)


def as_arrays(
  automaton: Automaton,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns source, token, target and accepting on the device."""
  return (
    jnp.asarray(automaton.source, jnp.int32),
    jnp.asarray(automaton.token, jnp.int32),
    jnp.asarray(automaton.target, jnp.int32),
    jnp.asarray(automaton.accepting, bool),
  )
