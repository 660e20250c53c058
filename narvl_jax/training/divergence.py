"""How far the distributions of a student are from those of its teacher.

Letters: b batch, n queries, l labels, c classes of a chunk, d width.
"""

import jax
import jax.numpy as jnp

# Below every logit, and finite, so that differences are never NaN.
_LOWEST = -1e30


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

  q_l is what the teacher says at label l, p_n what query n says if it does not
  say blank: its distribution over the other classes, which sums to 1. Both
  are softened by the temperature t, and the divergence is multiplied by t^2,
  as its gradient falls with 1 / t^2.

  A few products of small matrices hold all that is needed of the classes, so
  they are dealt out to chunks; the gradient computes each chunk again. Class i
  goes to chunk i modulo their number: where the rows of the table are split
  over devices, each has its share of every chunk.

  Args:
    states: [B, N, D] decoder states of the student.
    table: [V, D], its tied table.
    teacher_states: [B, L, E], those that predict the labels.
    teacher_table: [W, E]; gets no gradient, nor do its states.
    blank_id: id of blank, which the teacher does not have: the last.
    vocab_size: number of the student's true classes.
    temperature: t, above 0.
    chunk_size: at most so many classes at a time; 0 for all at once.

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
  # Rows that fill the last chunk are like those that pad the table.
  spoken = (ids < vocab_size) & (ids != blank_id)

  def add(
    carry: tuple[jax.Array, ...], rows: tuple[jax.Array, ...]
  ) -> tuple[tuple[jax.Array, ...], None]:
    lse, teacher_lse, own, theirs = carry
    table, teacher_table, spoken = rows
    z = _logits(states, table, spoken, temperature)
    t = _logits(teacher_states, teacher_table, spoken, temperature)
    lse = jnp.logaddexp(lse, jax.nn.logsumexp(z, axis=-1))
    total = jnp.logaddexp(teacher_lse, jax.nn.logsumexp(t, axis=-1))
    # Means over the classes so far, of which the teacher has `total`.
    kept = jnp.exp(teacher_lse - total)
    q = jnp.exp(t - total[..., None])
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
  states: jax.Array, rows: jax.Array, spoken: jax.Array, temperature: float
) -> jax.Array:
  """Returns softened logits float32 [B, S, C]."""
  z = jnp.einsum("bsd,cd->bsc", states, rows, preferred_element_type="float32")
  return jnp.where(spoken, z / temperature, _LOWEST)


def _as_long(table: jax.Array, rows: int) -> jax.Array:
  """Returns the first rows; padding may be more or less."""
  missing = max(rows - len(table), 0)
  return jnp.pad(table[:rows], ((0, missing), (0, 0)))


def _deal(x: jax.Array, steps: int) -> jax.Array:
  """Returns [steps, C, ...] of [V, ...]; zeros fill up."""
  size = -(-len(x) // steps)
  fill = steps * size - len(x)
  if fill:
    x = jnp.pad(x, ((0, fill), *((0, 0),) * (x.ndim - 1)))
  return x.reshape(size, steps, *x.shape[1:]).swapaxes(0, 1)
