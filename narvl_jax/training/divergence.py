"""Divergence of a student's distributions from those of its teacher.

Letters: b batch, n queries, l labels, c classes of a chunk, d width.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Below every logit, and finite: the difference of two of them is not NaN.
_LOWEST = float(np.finfo(np.float32).min)


def token_divergences(
  states: jax.Array,
  table: jax.Array,
  teacher_states: jax.Array,
  teacher_table: jax.Array,
  *,
  blank_id: int,
  vocab_size: int,
  temperature: float = 1.0,
  chunk_size: int = 0,
) -> jax.Array:
  """Divergence KL(q_l || p_n) of every query from every label's teacher.

  q_l is the teacher's distribution at label l. p_n is the distribution of
  query n over all classes but blank, normalised to sum to 1. Both are softened
  by the temperature t. The divergence is multiplied by t^2, because its
  gradient falls with 1 / t^2.

  The classes are processed in chunks, and the gradient computes each chunk
  again. Class i belongs to chunk i modulo the number of chunks, so that with a
  table split over devices each device has its share of every chunk.

  Args:
    states: [B, N, D] decoder states of the student.
    table: [V, D], its tied table.
    teacher_states: [B, L, E], the states that predict the labels; they and the
      teacher's table get no gradient.
    teacher_table: [W, E].
    blank_id: id of blank, the last class, which the teacher does not have.
    vocab_size: number of the student's true classes.
    temperature: t, above 0.
    chunk_size: most classes at a time; 0 for all at once.

  Returns:
    float32 [B, N, L].

  Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
  """
  batch, queries, _ = states.shape
  labels = teacher_states.shape[1]
  steps = -(-len(table) // (chunk_size or len(table)))
  teacher_states, teacher_table = jax.lax.stop_gradient(
    (teacher_states, teacher_table)
  )
  teacher_table = _as_long(teacher_table, len(table))
  ids = jnp.arange(len(table), dtype=jnp.int32)
  # The last chunk is filled with zeros, hence False here.
  spoken = (ids < vocab_size) & (ids != blank_id)

  def add(
    carry: tuple[jax.Array, ...], rows: tuple[jax.Array, ...]
  ) -> tuple[tuple[jax.Array, ...], None]:
    lse, teacher_lse, own, theirs = carry
    table, teacher_table, spoken = rows
    z = _logits(states, table, temperature)
    t = _logits(teacher_states, teacher_table, temperature)
    lse = jnp.logaddexp(lse, _logsumexp(z, spoken))
    total = jnp.logaddexp(teacher_lse, _logsumexp(t, spoken))
    # `own` and `theirs` are means over the classes so far, weighted by q, whose
    # normaliser is `total`. Masked logits are 0 here: `_LOWEST` would overflow.
    kept = jnp.exp(teacher_lse - total)
    q = jnp.where(spoken, jnp.exp(t - total[..., None]), 0.0)
    z, t = (jnp.where(spoken, x, 0.0) for x in (z, t))
    own = own * kept[:, None] + jnp.einsum("bnc,blc->bnl", z, q)
    theirs = theirs * kept + jnp.sum(q * t, axis=-1)
    return (lse, total, own, theirs), None

  carry = (
    jnp.full((batch, queries), _LOWEST),
    jnp.full((batch, labels), _LOWEST),
    jnp.zeros((batch, queries, labels)),
    jnp.zeros((batch, labels)),
  )
  rows = (
    table.astype(states.dtype),
    teacher_table.astype(teacher_states.dtype),
    spoken,
  )
  if steps == 1:
    carry, _ = add(carry, rows)
  else:
    dealt = tuple(_deal(x, steps) for x in rows)
    carry, _ = jax.lax.scan(jax.checkpoint(add), carry, dealt)
  lse, teacher_lse, own, theirs = carry
  cross_entropy = lse[..., None] - own
  entropy = teacher_lse - theirs
  return temperature**2 * (cross_entropy - entropy[:, None])


def _logits(
  states: jax.Array, rows: jax.Array, temperature: float
) -> jax.Array:
  """Returns softened logits float32 [B, S, C]."""
  z = jnp.einsum("bsd,cd->bsc", states, rows, preferred_element_type="float32")
  return z / temperature


def _logsumexp(logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the logsumexp over the classes in mask [C], float32 [B, S]."""
  return jax.nn.logsumexp(jnp.where(mask, logits, _LOWEST), axis=-1)


def _as_long(table: jax.Array, rows: int) -> jax.Array:
  """Returns the table cut or padded with zeros to `rows` rows."""
  missing = max(rows - len(table), 0)
  return jnp.pad(table[:rows], ((0, missing), (0, 0)))


def _deal(x: jax.Array, steps: int) -> jax.Array:
  """Deals [V, ...] out to chunks [steps, C, ...], filled with zeros."""
  size = -(-len(x) // steps)
  fill = steps * size - len(x)
  if fill:
    x = jnp.pad(x, ((0, fill), *((0, 0),) * (x.ndim - 1)))
  return x.reshape(size, steps, *x.shape[1:]).swapaxes(0, 1)
