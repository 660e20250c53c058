"""The head for decoder states and table: logits in chunks of classes.

No array [B, N, V] exists: every chunk of the logits is computed, reduced and
dropped, and the backward pass computes it again. That costs one matrix product
more than storing the logits. The rows of the table may be split over a mesh
axis. The communication over it is [B, N], [B, N, L+1] and, for the gradient of
the states, [B, N, D] numbers.

Letters: m = B * N queries of the batch, c classes of a chunk, d width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from narvl_jax.query_ctc.axes import Split
from narvl_jax.query_ctc.compact import LogitGradient, Summary
from narvl_jax.query_ctc.log_space import Normalizer, zero_if_none


@dataclasses.dataclass(frozen=True)
class ChunkedLogits:
  """The logits states @ table.T, to be computed in chunks.

  Attributes:
    states: [B, N, D]; the matrix products have their dtype.
    table: [V, D].
    chunk_size: most classes at a time.
  """

  states: jax.Array
  table: jax.Array
  chunk_size: int

  @property
  def shape(self) -> tuple[int, ...]:
    """[B, N, V]."""
    return (*self.states.shape[:-1], self.table.shape[0])


@dataclasses.dataclass(frozen=True)
class ChunkedHead:
  """A `compact.Head` whose inputs are states [B, N, D] and table [V, D].

  Attributes:
    vocab_size: number of true classes.
    split: how batch and classes are split.
  """

  vocab_size: int
  chunk_size: int
  split: Split

  def summarize(
    self, inputs: tuple[jax.Array, jax.Array], columns: jax.Array
  ) -> Summary:
    """See `compact.Head`."""
    split = self.split

    def local(
      states: jax.Array, table: jax.Array, columns: jax.Array
    ) -> Summary:
      size = split.true_classes(self.vocab_size, len(table))
      part = _normalizer(states, table, size, self.chunk_size)
      # The sum of the logits is the product of states and summed rows.
      true_row = jnp.arange(len(table))[:, None] < size
      row_sum = jnp.sum(
        jnp.where(true_row, table, 0), axis=0, dtype=jnp.float32
      )
      total = jnp.einsum(
        "bnd,d->bn", states.astype(jnp.float32), row_sum, precision="highest"
      )
      rows = _rows_at(table, split.local_ids(columns, len(table)))
      gathered = _product("bnd,bkd->bnk", states, rows)
      total, gathered = split.sum_over_classes((total, gathered))
      return Summary(split.join(part), total, gathered)

    states, table = inputs
    return split.run(
      local,
      states,
      # Cast before the split, so that fsdp gathers half as many bytes.
      table.astype(states.dtype),
      columns,
      in_specs=(split.rows, split.table, split.rows),
      out_specs=split.rows,
    )

  def pull_back(
    self, inputs: tuple[jax.Array, jax.Array], gradient: LogitGradient
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of states and table."""
    split = self.split

    def local(
      states: jax.Array, table: jax.Array, gradient: LogitGradient
    ) -> tuple[jax.Array, jax.Array]:
      size = split.true_classes(self.vocab_size, len(table))
      # All examples share the products, and zero times NaN is NaN.
      states = jnp.where(gradient.live[:, None, None], states, 0)
      d_states, d_table = _softmax_gradient(
        states, table, gradient, size, self.chunk_size
      )
      columns = split.local_ids(gradient.columns, len(table))
      rows = _rows_at(table, columns)
      d_states -= _product("bnk,bkd->bnd", gradient.taken, rows)
      d_rows = _product("bnk,bnd->bkd", gradient.taken, states)
      d_table = d_table.at[columns].add(-d_rows, mode="drop")
      # Gradients are communicated in the compute type, as everywhere.
      d_states = split.sum_over_classes(d_states.astype(states.dtype))
      return d_states, split.sum_over_batch(d_table.astype(states.dtype))

    states, table = inputs
    d_states, d_table = split.run(
      local,
      states,
      table.astype(states.dtype),
      gradient,
      in_specs=(split.rows, split.table, split.rows),
      out_specs=(split.rows, split.table_gradient),
    )
    return d_states, d_table.astype(table.dtype)


def _normalizer(
  states: jax.Array, table: jax.Array, vocab_size: Any, chunk_size: int
) -> Normalizer:
  """Returns the normalizer [B, N] of the logits, with a running maximum."""
  b, n, d = states.shape
  flat = states.reshape(b * n, d)

  def add(
    carry: tuple[jax.Array, jax.Array], rows: jax.Array, mask: Any, _: Any
  ) -> tuple[jax.Array, jax.Array]:
    largest, mass = carry
    z = mask(_product("md,cd->mc", flat, rows), -jnp.inf)
    new = jnp.maximum(largest, jnp.max(z, axis=1))
    shift = zero_if_none(new)
    mass *= jnp.exp(largest - shift)
    mass += jnp.sum(jnp.exp(z - shift[:, None]), axis=1)
    return new, mass

  start = (
    jnp.full(b * n, -jnp.inf, jnp.float32),
    jnp.zeros(b * n, jnp.float32),
  )
  largest, mass = _over_chunks(add, start, table, vocab_size, chunk_size)
  return Normalizer(largest.reshape(b, n), jnp.log(mass).reshape(b, n))


def _softmax_gradient(
  states: jax.Array,
  table: jax.Array,
  gradient: LogitGradient,
  vocab_size: Any,
  chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns float32 gradients of states and table, without the columns."""
  b, n, d = states.shape
  flat = states.reshape(b * n, d)
  normalizer = jax.tree.map(lambda x: x.reshape(b * n, 1), gradient.normalizer)
  scale = jnp.repeat(gradient.scale, n)[:, None]
  offset = jnp.repeat(gradient.offset, n)[:, None]

  def add(
    carry: tuple[jax.Array, jax.Array], rows: jax.Array, mask: Any, first: Any
  ) -> tuple[jax.Array, jax.Array]:
    d_states, d_table = carry
    # Padding of the table may contain NaN, and zero times NaN is NaN.
    rows = mask(rows.T, 0).T
    z = _product("md,cd->mc", flat, rows)
    g = scale * jnp.exp(normalizer.log_probs(z)) + offset
    g = mask(g, 0.0).astype(flat.dtype)
    d_states += _product("mc,cd->md", g, rows)
    d_rows = _product("mc,md->cd", g, flat)
    # Added, since the last chunk may overlap the one before.
    d_rows += jax.lax.dynamic_slice_in_dim(d_table, first, len(rows))
    return d_states, jax.lax.dynamic_update_slice_in_dim(
      d_table, d_rows, first, 0
    )

  start = (
    jnp.zeros((b * n, d), jnp.float32),
    jnp.zeros(table.shape, jnp.float32),
  )
  d_states, d_table = _over_chunks(add, start, table, vocab_size, chunk_size)
  return d_states.reshape(b, n, d), d_table


def _over_chunks(
  add: Callable[..., Any],
  carry: Any,
  table: jax.Array,
  vocab_size: Any,
  chunk_size: int,
) -> Any:
  """Folds `add(carry, rows, mask, first)` over chunks of the table.

  Args:
    add: returns the next carry. It takes the rows [C, D] from row `first` on,
      and a function mask(x [M, C], fill) that fills the columns of padding and
      of rows that an earlier chunk had.
    carry: initial value.
    table: [V, D].
    chunk_size: upper bound of C.
  """
  classes = len(table)
  steps = -(-classes // chunk_size)
  size = -(-classes // steps)

  def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
    # All chunks have the same size, so the last one may start earlier.
    first = jnp.minimum(index * size, classes - size)
    rows = jax.lax.dynamic_slice_in_dim(table, first, size)

    def mask(x: jax.Array, fill: float) -> jax.Array:
      if isinstance(vocab_size, int) and vocab_size == steps * size:
        return x
      ids = first + jnp.arange(size)
      return jnp.where((ids >= index * size) & (ids < vocab_size), x, fill)

    return add(carry, rows, mask, first), None

  return jax.lax.scan(step, carry, jnp.arange(steps))[0]


def _rows_at(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns the rows [B, L+1, D]; zeros for an id outside of the table."""
  return table.at[ids].get(mode="fill", fill_value=0)


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns an einsum that accumulates in float32."""
  return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
