"""The head for decoder states and table: logits of a few examples at a time.

No array [B, N, V] exists: the logits of a block of examples are computed,
reduced and dropped. The gradient of an objective, which is known to be a
weighted sum over the examples, is computed in the same pass, so that the matrix
products are those of whole logits. Other losses compute the logits again in
their backward pass.

The rows of the table may be split over a mesh axis. The communication over it
is [B, N], [B, N, L+1] and, for the gradient of the states, [B, N, D] numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from narvl_jax.query_ctc import compact
from narvl_jax.query_ctc.axes import Split
from narvl_jax.query_ctc.compact import LogitGradient, Summary
from narvl_jax.query_ctc.dense import DenseHead

# States [B, N, D] and table [V, D].
Inputs = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class ChunkedLogits:
  """The logits states @ table.T, to be computed in blocks of examples.

  Attributes:
    states: [B, N, D]; the matrix products have their dtype.
    table: [V, D].
    chunk_size: most classes whose gradient exists at a time. A block of
      examples has at most as many logits as the whole batch has of these
      classes, or as the table has numbers.
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

  @property
  def _block(self) -> DenseHead:
    """The head of the logits of a block, within the program of a device."""
    return DenseHead(
      self.vocab_size, dataclasses.replace(self.split, inside=True)
    )

  def summarize(self, inputs: Inputs, columns: jax.Array) -> Summary:
    """See `compact.Head`."""

    def local(
      states: jax.Array, table: jax.Array, columns: jax.Array
    ) -> Summary:
      def step(_: None, block: Any) -> tuple[None, Summary]:
        states, columns = block
        return None, self._block.summarize(_logits(states, table), columns)

      return self._over_blocks(step, table, (states, columns))[1]

    states, table = inputs
    split = self.split
    return split.run(
      local,
      states,
      # Cast before the split, so that fsdp gathers half as many bytes.
      table.astype(states.dtype),
      columns,
      in_specs=(split.rows, split.table, split.rows),
      out_specs=split.rows,
    )

  def pull_back(self, inputs: Inputs, gradient: LogitGradient) -> Inputs:
    """Returns the gradients of states and table."""

    def of_block(z: jax.Array, block: Any) -> tuple[LogitGradient, None]:
      del z
      return block[0], None

    return self._gradients(of_block, inputs, (gradient,))[0]

  def value_and_gradients(
    self, blank_id: int, inputs: Inputs, *examples: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], Inputs]:
    """Returns the terms of `compact.ctc_terms`, and gradients of a sum of them.

    Args:
      blank_id: id of the blank class.
      inputs: states and table.
      *examples: labels, their lengths and temper, see `compact.ctc_terms`, and
        the weights [B] of both terms in the sum.
    """

    def of_block(z: jax.Array, block: Any) -> tuple[LogitGradient, Any]:
      *args, nll_weight, mean_weight = block
      head, weights = self._block, (nll_weight, mean_weight)
      terms, residuals = compact.forward(head, blank_id, z, *args)
      return compact.gradient(head, residuals, weights), terms

    gradients, terms = self._gradients(of_block, inputs, examples)
    return terms, gradients

  def _gradients(
    self,
    of_block: Callable[[jax.Array, Any], tuple[LogitGradient, Any]],
    inputs: Inputs,
    examples: tuple[Any, ...],
  ) -> tuple[Inputs, Any]:
    """Returns the gradients of states and table, and the blocks' results.

    Args:
      of_block: from logits and examples of a block returns the gradient of the
        logits and a result.
      inputs: states and table.
      examples: arrays [B, ...].
    """
    split = self.split

    def local(states: jax.Array, table: jax.Array, *examples: Any) -> Any:
      size = split.true_classes(self.vocab_size, len(table))

      def step(d_table: jax.Array | None, block: Any) -> Any:
        states, *examples = block
        z = _logits(states, table)
        gradient, result = of_block(z, examples)
        # All examples share the products, and zero times NaN is NaN.
        states = jnp.where(gradient.live[:, None, None], states, 0)
        columns = split.local_ids(gradient.columns, len(table))
        gradient = gradient._replace(columns=columns)
        d_states, d_table = _pull_back(
          z, states, table, gradient, size, self.chunk_size, d_table
        )
        return d_table, (d_states.astype(states.dtype), result)

      d_table, (d_states, result) = self._over_blocks(
        step,
        table,
        (states, *examples),
        lambda: jnp.zeros(table.shape, jnp.float32),
      )
      # Gradients are communicated in the compute type, as everywhere.
      d_states = split.sum_over_classes(d_states)
      d_table = split.sum_over_batch(d_table.astype(states.dtype))
      return (d_states, d_table), result

    states, table = inputs
    (d_states, d_table), result = split.run(
      local,
      states,
      table.astype(states.dtype),
      *examples,
      in_specs=(split.rows, split.table, *(split.rows for _ in examples)),
      out_specs=((split.rows, split.table_gradient), split.rows),
    )
    return (d_states, d_table.astype(table.dtype)), result

  def _over_blocks(
    self,
    step: Callable[[Any, Any], tuple[Any, Any]],
    table: jax.Array,
    examples: tuple[Any, ...],
    start: Callable[[], Any] = lambda: None,
  ) -> tuple[Any, Any]:
    """Scans over blocks of examples; returns the carry and [B, ...] results.

    Args:
      step: see `jax.lax.scan`; the carry of the only block is None.
      table: [V, D].
      examples: arrays [B, ...], the states first.
      start: returns the carry of the first of several blocks.
    """
    count, queries, width = examples[0].shape
    most = max(
      count * self.chunk_size // len(table), -(-width // max(queries, 1)), 1
    )
    blocks = -(-count // most)
    if blocks <= 1:
      return step(None, examples)
    size = -(-count // blocks)

    def to_blocks(x: jax.Array) -> jax.Array:
      # Zeros: an example without labels and without weight.
      padding = [(0, blocks * size - count)] + [(0, 0)] * (x.ndim - 1)
      return jnp.pad(x, padding).reshape(blocks, size, *x.shape[1:])

    carry, out = jax.lax.scan(step, start(), jax.tree.map(to_blocks, examples))
    return carry, jax.tree.map(
      lambda x: x.reshape(blocks * size, *x.shape[2:])[:count], out
    )


def _pull_back(
  z: jax.Array,
  states: jax.Array,
  table: jax.Array,
  gradient: LogitGradient,
  vocab_size: Any,
  chunk_size: int,
  d_table: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the float32 gradient of the states, and the table's added to it.

  The gradient of the logits exists for a chunk of classes at a time.

  Args:
    z: logits [b, N, V].
    states: [b, N, D], zero for examples without gradient.
    table: [V, D].
    gradient: of the logits; the columns are those of this table.
    vocab_size: number of true classes.
    chunk_size: most classes of a chunk.
    d_table: [V, D]; None for zero.
  """
  classes = len(table)
  steps = -(-classes // chunk_size)
  size = -(-classes // steps)
  normalizer = jax.tree.map(lambda x: x[:, :, None], gradient.normalizer)
  scale, offset = (x[:, None, None] for x in (gradient.scale, gradient.offset))

  def step(carry: Any, index: jax.Array) -> tuple[Any, Any]:
    d_states, d_table = carry
    # All chunks have the same size, so the last one may start earlier.
    first = jnp.minimum(index * size, classes - size)
    rows = jax.lax.dynamic_slice_in_dim(table, first, size)
    part = jax.lax.dynamic_slice_in_dim(z, first, size, axis=2)
    part = jnp.where(gradient.live[:, None, None], part, 0.0)
    g = scale * jnp.exp(normalizer.log_probs(part)) + offset
    if not isinstance(vocab_size, int) or vocab_size < steps * size:
      ids = first + jnp.arange(size)
      mask = (ids >= index * size) & (ids < vocab_size)
      g = jnp.where(mask, g, 0.0)
      # Padding of the table may contain NaN.
      rows = jnp.where(mask[:, None], rows, 0)
    g = g.astype(states.dtype).reshape(len(flat), size)
    d_states += _product("mc,cd->md", g, rows)
    d_rows = _product("mc,md->cd", g, flat)
    if d_table is None:
      return (d_states, None), d_rows
    # Added, since the last chunk may overlap the one before.
    d_rows += jax.lax.dynamic_slice_in_dim(d_table, first, size)
    d_table = jax.lax.dynamic_update_slice_in_dim(d_table, d_rows, first, 0)
    return (d_states, d_table), None

  # Over one axis: for a sum over two, XLA transposes arrays on a CPU.
  flat = states.reshape(-1, states.shape[-1])
  d_states = jnp.zeros(flat.shape, jnp.float32)
  if d_table is None and steps * size > classes:
    d_table = jnp.zeros(table.shape, jnp.float32)
  found: Any
  (d_states, found), parts = jax.lax.scan(
    step, (d_states, d_table), jnp.arange(steps)
  )
  # Of one block it is written once, not read and added.
  if found is None:
    found = parts.reshape(table.shape)
  # An id outside of the table has a row of zeros.
  rows = table.at[gradient.columns].get(mode="fill", fill_value=0)
  d_states = d_states.reshape(states.shape)
  d_states -= _product("bnk,bkd->bnd", gradient.taken, rows)
  d_rows = _product("bnk,bnd->bkd", gradient.taken, states)
  return d_states, found.at[gradient.columns].add(-d_rows, mode="drop")


def _logits(states: jax.Array, table: jax.Array) -> jax.Array:
  return _product("bnd,vd->bnv", states, table)


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns an einsum that accumulates in float32."""
  return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_terms(
  head: ChunkedHead, blank_id: int, inputs: Inputs, *examples: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the weighted sum of both terms, and the terms.

  Differentiable once, in reverse mode, the sum with respect to `inputs` only.

  Args:
    inputs: states and table.
    *examples: see `ChunkedHead.value_and_gradients`.
  """
  *args, nll_weight, mean_weight = examples
  nll, mean = compact.ctc_terms(head, blank_id, inputs, *args)
  return _sum(nll, nll_weight) + _sum(mean, mean_weight), nll, mean


def _sum(terms: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns a sum in which a term without weight may be NaN."""
  return jnp.sum(jnp.where(weights != 0, weights * terms, 0.0))


def _forward(
  head: ChunkedHead, blank_id: int, inputs: Inputs, *examples: jax.Array
) -> Any:
  (nll, mean), gradients = head.value_and_gradients(blank_id, inputs, *examples)
  *_, nll_weight, mean_weight = examples
  total = _sum(nll, nll_weight) + _sum(mean, mean_weight)
  return (total, nll, mean), gradients


def _backward(
  head: ChunkedHead, blank_id: int, gradients: Inputs, cotangents: Any
) -> tuple[Any, ...]:
  del head, blank_id
  total, *_ = cotangents
  scaled = jax.tree.map(lambda x: (total * x).astype(x.dtype), gradients)
  return scaled, None, None, None, None, None


weighted_terms.defvjp(_forward, _backward)
