"""Probabilities of a parallel model's answers, queries and coordinates.

The CTC likelihood of an answer is the sum over all of its alignments. Unlike
the Query-CTC loss, it is computed for several answers of an example, and
repeats need not be merged: then, every query that does not emit blank emits a
label of its own, and alignments differ only in the places of the blanks.

`axes` are the mesh axes that split batch and classes.

Letters: B batch, N queries, C answers, L labels, K bins, V classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from narvl_jax.query_ctc import MeshAxes
from narvl_jax.query_ctc.axes import split_of
from narvl_jax.query_ctc.compact import class_columns
from narvl_jax.query_ctc.log_space import LOG_ZERO, normalizer
from narvl_jax.query_ctc.loss import make_head

# A trained model gives nearly all probability to the likeliest 32 bins.
_BINS = 32

# Query int32 -> log-probabilities of blank [B] and of the labels [B, C, L].
Emissions = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def sum_alignments(
  emissions: Emissions,
  labels: jax.Array,
  lengths: jax.Array,
  merge_repeats: bool | jax.Array,
  num_queries: int,
  *,
  add: Callable[[jax.Array, jax.Array], jax.Array] = jnp.logaddexp,
) -> jax.Array:
  """Returns the log-likelihoods of the answers, float32 [B, C].

  Args:
    emissions: log-probabilities of one query; called once, in a scan.
    labels: int32 [B, C, L], right padded with any id.
    lengths: int32 [B, C].
    merge_repeats: bool or bool [B].
    num_queries: N.
    add: joins alignments; `jnp.maximum` scores the best one instead.

  Source: Graves et al. 2006, section 4.1, forward variables.
  """
  b, c, size = labels.shape
  merge = jnp.broadcast_to(jnp.asarray(merge_repeats, bool), (b,))
  merge = merge[:, None, None]
  # Where repeats are merged, equal labels need a blank between them.
  joined = jnp.pad(
    labels[..., 1:] == labels[..., :-1], ((0, 0), (0, 0), (1, 0))
  )
  joined &= merge

  def step(
    alphas: tuple[jax.Array, jax.Array], query: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    # Both [B, C, L+1]: after l labels, the last query emitted blank or label l.
    blank, label = alphas
    of_blank, of_label = emissions(query)
    before = add(blank[..., :-1], jnp.where(joined, LOG_ZERO, label[..., :-1]))
    again = jnp.where(merge, label[..., 1:], LOG_ZERO)
    emitted = add(before, again) + of_label
    blank = add(blank, label) + of_blank[:, None, None]
    return (blank, label.at[..., 1:].set(emitted)), None

  nothing = jnp.full((b, c, size + 1), LOG_ZERO, jnp.float32)
  start = (nothing.at[..., 0].set(0.0), nothing)
  (blank, label), _ = jax.lax.scan(step, start, jnp.arange(num_queries))
  total = add(blank, label)
  return jnp.take_along_axis(total, lengths[..., None], axis=-1)[..., 0]


def answer_log_prob(
  logits: jax.Array,
  ids: jax.Array,
  lengths: jax.Array,
  merge_repeats: jax.Array,
  *,
  blank_id: int,
  axes: MeshAxes,
) -> jax.Array:
  """Returns the log-likelihood of one answer an example, float32 [B].

  Args:
    logits: [B, N, V] float32, -inf for classes that are never predicted.
    ids: int32 [B, L], right padded with any id.
    lengths: int32 [B].
    merge_repeats: bool [B].
  """
  emitted = label_log_probs(
    logits, class_columns(ids, lengths, blank_id)[0], axes
  )
  return sum_alignments(
    lambda query: (emitted[:, query, 0], emitted[:, query, None, 1:]),
    ids[:, None],
    lengths[:, None],
    merge_repeats,
    logits.shape[1],
  )[:, 0]


def label_log_probs(
  logits: jax.Array, columns: jax.Array, axes: MeshAxes
) -> jax.Array:
  """Returns log-probabilities float32 [B, N, L] of the classes int32 [B, L]."""
  head, inputs = make_head(logits, logits.shape[-1], axes)
  summary = head.summarize(inputs, columns)
  own = jax.tree.map(lambda x: x[..., None], summary.normalizer)
  return own.log_probs(summary.gathered)


def query_entropy(logits: jax.Array, axes: MeshAxes) -> jax.Array:
  """Returns the entropy of every query in nats, float32 [B, N].

  Args:
    logits: [B, N, V] float32, -inf for classes that are never predicted.
    axes: mesh axes that split batch and classes.
  """
  split = split_of(axes, logits.shape[0], logits.shape[-1])

  def local(logits: jax.Array) -> jax.Array:
    whole = split.join(normalizer(logits))
    whole = jax.tree.map(lambda x: x[..., None], whole)
    log_probs = whole.log_probs(logits)
    impossible = log_probs == LOG_ZERO
    terms = jnp.where(impossible, 0.0, jnp.exp(log_probs) * log_probs)
    return -split.sum_over_classes(jnp.sum(terms, axis=-1))

  return split.run(
    local, logits, in_specs=(split.logits,), out_specs=split.rows
  )


def coordinate_distributions(
  logits: jax.Array,
  ids: jax.Array,
  lengths: jax.Array,
  merge_repeats: jax.Array,
  *,
  blank_id: int,
  bins: tuple[int, int],
  axes: MeshAxes,
) -> tuple[jax.Array, jax.Array]:
  """Returns the likeliest bins of the four coordinates of a box.

  The distribution of a coordinate is that of the query which emits it in the
  likeliest alignment, renormalised over the bins. Of several queries that emit
  it, the most confident one counts.

  Args:
    logits: see `query_entropy`.
    ids: int32 [B, L], answers; those without four bins give arbitrary results.
    lengths: int32 [B].
    merge_repeats: bool [B].
    bins: id of the first bin, and their number.

  Returns:
    Bins counted from 0, int32 [B, 4, K], and their probabilities, float32
    [B, 4, K], likeliest first; K is at most 32.
  """
  first, count = bins
  columns, _ = class_columns(ids, lengths, blank_id)
  emitted = label_log_probs(logits, columns, axes)

  def best(emitted: jax.Array) -> jax.Array:
    return jnp.sum(
      sum_alignments(
        lambda query: (emitted[:, query, 0], emitted[:, query, None, 1:]),
        ids[:, None],
        lengths[:, None],
        merge_repeats,
        logits.shape[1],
        add=jnp.maximum,
      )
    )

  # The gradient of the best alignment's score is that alignment.
  used = jax.grad(best)(emitted)[..., 1:] > 0
  queries = jnp.argmax(jnp.where(used, emitted[..., 1:], LOG_ZERO), axis=1)
  valid = jnp.arange(ids.shape[1]) < lengths[:, None]
  is_bin = valid & (ids >= first) & (ids < first + count)
  places = jnp.argsort(~is_bin, axis=1, stable=True)[:, :4]
  chosen = jnp.take_along_axis(queries, places, axis=1)
  rows = jnp.take_along_axis(logits, chosen[..., None], axis=1)
  every = jnp.broadcast_to(
    jnp.arange(first, first + count, dtype=jnp.int32), (len(ids), count)
  )
  probs = jax.nn.softmax(label_log_probs(rows, every, axes), axis=-1)
  values, found = jax.lax.top_k(probs, min(_BINS, count))
  return found.astype(jnp.int32), values
