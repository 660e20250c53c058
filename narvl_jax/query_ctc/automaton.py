"""How many queries an answer of a constraint still needs."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# More queries than any model has; small enough to be added to.
UNREACHABLE = 1 << 20


class LabelAutomaton(Protocol):
  """A deterministic automaton over labels, as a list of edges.

  `narvl_jax.decoding.constraint.Automaton` is one; walks begin in state 0.
  """

  @property
  def source(self) -> np.ndarray | jax.Array:
    """int32 [E] state that an edge leaves."""
    ...

  @property
  def token(self) -> np.ndarray | jax.Array:
    """int32 [E] label that it takes; no two edges of a state share one."""
    ...

  @property
  def target(self) -> np.ndarray | jax.Array:
    """int32 [E] state that it enters."""
    ...

  @property
  def accepting(self) -> np.ndarray | jax.Array:
    """bool [S] states in which an answer may end."""
    ...


class QueriesNeeded(NamedTuple):
  """Least number of queries that complete an answer.

  Attributes:
    from_state: int32 [S] if the last query said blank, or none spoke yet.
    after_edge: int32 [E] if the last query said the label of the edge; a label
      that follows itself needs a blank between where repeats are merged.
  """

  from_state: jax.Array
  after_edge: jax.Array


def queries_needed(
  automaton: LabelAutomaton, merge_repeats: Any, num_queries: int
) -> QueriesNeeded:
  """Returns what the rest of an answer takes, up to a bound.

  Args:
    automaton: with E edges and S states.
    merge_repeats: bool scalar.
    num_queries: the bound; what needs more counts as more, up to
      `UNREACHABLE`.
  """
  source, token, target, accepting = as_arrays(automaton)
  states = accepting.shape[0]
  edges = token.shape[0]
  order = jnp.arange(edges, dtype=jnp.int32)
  never = jnp.full(states, UNREACHABLE, jnp.int32)

  def least(values: jax.Array) -> jax.Array:
    """The least of the edges that leave each state."""
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
      repeats,
      jnp.minimum(first[target] + 1, second[target]),
      first[target],
    )
    return jnp.where(accepting[target], 0, jnp.minimum(onward, UNREACHABLE))

  start = jnp.full(token.shape, UNREACHABLE, jnp.int32)
  after = jax.lax.fori_loop(0, num_queries, step, start)
  before = jnp.where(accepting, 0, least(jnp.minimum(after + 1, UNREACHABLE)))
  return QueriesNeeded(before, after)


def as_arrays(
  automaton: LabelAutomaton,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns source, token, target and accepting on the device."""
  return (
    jnp.asarray(automaton.source, jnp.int32),
    jnp.asarray(automaton.token, jnp.int32),
    jnp.asarray(automaton.target, jnp.int32),
    jnp.asarray(automaton.accepting, bool),
  )
