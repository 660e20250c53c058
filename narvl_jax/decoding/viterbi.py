"""The best alignment whose labels follow a path of an automaton.

Letters: N queries, E edges, S states.
"""

import jax
import jax.numpy as jnp

from narvl_jax.query_ctc.automaton import START, Automaton, as_arrays
from narvl_jax.query_ctc.log_space import LOG_ZERO


def best_path(
  blank_log_probs: jax.Array,
  edge_log_probs: jax.Array,
  constraint: Automaton,
  merge_repeats: jax.Array,
  *,
  blank_id: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the best alignment of one example, by Viterbi's algorithm.

  A node of the search is a state after which the last query emitted blank (S
  nodes), or an edge whose label it emitted (E nodes).

  Args:
    blank_log_probs: float32 [N] of blank.
    edge_log_probs: float32 [N, E] of the label of each edge.
    merge_repeats: bool scalar.

  Returns:
    The class of every query, int32 [N], and their log-probability. If no
    alignment is possible, that is -inf and the classes are arbitrary.
  """
  source, token, target, accepting = as_arrays(constraint)
  edges, states = token.shape[0], accepting.shape[0]
  # Nodes are numbered: edges first, then states.
  in_blank = edges + jnp.arange(states, dtype=jnp.int32)
  order = jnp.arange(edges, dtype=jnp.int32)

  def step(
    scores: tuple[jax.Array, jax.Array], log_probs: tuple[jax.Array, jax.Array]
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    blank, label = scores
    of_blank, of_label = log_probs
    (entering, entering_edge), (before, before_edge) = _entering(
      label, constraint, merge_repeats
    )
    again = jnp.where(merge_repeats, label, LOG_ZERO)
    choices = jnp.stack([blank[source], again, before])
    origins = jnp.stack([in_blank[source], order, before_edge])
    chosen = jnp.argmax(choices, axis=0)[None]
    label_from = jnp.take_along_axis(origins, chosen, axis=0)[0]
    blank_from = jnp.where(blank >= entering, in_blank, entering_edge)
    scores = (
      jnp.maximum(blank, entering) + of_blank,
      jnp.max(choices, axis=0) + of_label,
    )
    return scores, jnp.concatenate([label_from, blank_from])

  start = (
    jnp.full(states, LOG_ZERO, jnp.float32).at[START].set(0.0),
    jnp.full(edges, LOG_ZERO, jnp.float32),
  )
  (blank, label), came_from = jax.lax.scan(
    step, start, (blank_log_probs, edge_log_probs)
  )
  ends = jnp.concatenate([accepting[target], accepting])
  scores = jnp.where(ends, jnp.concatenate([label, blank]), LOG_ZERO)
  last = jnp.argmax(scores).astype(jnp.int32)
  _, places = jax.lax.scan(
    lambda place, origins: (origins[place], place),
    last,
    came_from,
    reverse=True,
  )
  classes = token.at[places].get(mode="fill", fill_value=blank_id)
  return classes, scores[last]


def _entering(
  label: jax.Array, constraint: Automaton, merge: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """Finds the best edge into each state, and before each edge.

  Args:
    label: float32 [E] score of the best path that ends in the edge's label.
    merge: bool scalar, whether equal labels need a blank between them.

  Returns:
    Score and edge into each state, [S], and before each edge, [E]; where there
    is none, edge E and the score -inf.
  """
  source, token, target, accepting = as_arrays(constraint)
  edges = token.shape[0]
  order = jnp.arange(edges, dtype=jnp.int32)

  def best(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest = jnp.full(accepting.shape, LOG_ZERO, scores.dtype)
    largest = largest.at[target].max(scores)
    wins = (scores == largest[target]) & (scores > LOG_ZERO)
    edge = jnp.full(accepting.shape, edges, jnp.int32)
    return largest, edge.at[target].min(jnp.where(wins, order, edges))

  first, first_edge = best(label)
  first_token = token.at[first_edge].get(mode="fill", fill_value=-1)
  # The best edge with another token.
  is_other = token != first_token[target]
  other, other_edge = best(jnp.where(is_other, label, LOG_ZERO))
  same = merge & (first_token[source] == token)
  before = jnp.where(same, other[source], first[source])
  before_edge = jnp.where(same, other_edge[source], first_edge[source])
  return (first, first_edge), (before, before_edge)
