"""CTC over a large vocabulary by way of the few classes that matter.

A target of L labels touches L+1 classes: blank and the labels. The alignment
is solved on their log-probabilities alone; the gradient goes back to all V
classes in one pass. No array of the size of the logits exists but the
gradient, which XLA may put in their place.

Letters: b batch, n queries, l labels, k = L+1 compact classes, v vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import optax

# What optax takes for the logarithm of zero; -inf would give 0 * inf.
_LOG_ZERO = -1e5


def feasible(
  labels: jax.Array, label_lengths: jax.Array, num_queries: int
) -> jax.Array:
  """Whether the queries suffice for the labels: N >= L + adjacent repeats.

  Args:
    labels: [B, L] integers, right padded.
    label_lengths: [B] integers.
    num_queries: N.

  Returns:
    bool [B].
  """
  inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
  repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)
  return label_lengths + repeats <= num_queries


def _terms(
  logits: jax.Array,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
  blank_id: int,
  vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
  """CTC nll and mean log-probability per example, with one joint gradient.

  Differentiable once, in reverse, with respect to `logits` only.

  Args:
    logits: [B, N, V], any float dtype; the gradient has the same.
    labels: [B, L] integers, right padded with any id.
    label_lengths: [B] integers.
    temper: float32 [B], multiplies the log-probabilities.
    blank_id: id of the blank class.
    vocab_size: classes at and after it take no part.

  Returns:
    nll [B], zero where infeasible, and the mean of the (tempered)
    log-probabilities over queries and true classes [B]; float32.
  """
  terms, _ = _forward(
    logits, labels, label_lengths, temper, blank_id, vocab_size
  )
  return terms


def _forward(
  logits: jax.Array,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
  blank_id: int,
  vocab_size: int,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
  columns, first = _columns(labels, label_lengths, blank_id)
  lse, total, gathered = jax.lax.platform_dependent(
    logits,
    columns,
    cpu=functools.partial(_summarize_by_query, vocab_size=vocab_size),
    default=functools.partial(_summarize, vocab_size=vocab_size),
  )
  compact = gathered - lse[:, :, None]
  # Examples do not interact: the gradient of the sum holds each one's own.
  nll, pull_back = jax.vjp(
    lambda x: _compact_ctc(x, first, labels, label_lengths, temper), compact
  )
  (compact_grad,) = pull_back(jnp.ones_like(nll))
  mean = temper * jnp.mean(total / vocab_size - lse, axis=1)
  ok = feasible(labels, label_lengths, logits.shape[1])
  residuals = (logits, lse, compact, compact_grad, columns, first, temper, ok)
  return (nll, mean), residuals


def _backward(
  blank_id: int,
  vocab_size: int,
  residuals: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, None, None, None]:
  """Returns the gradient: scale * softmax + offset, less the occupancy.

  With c = temper and g = the posterior occupancy of a class:
  d nll / dz = c (softmax - g) and d mean / dz = c (1 / V - softmax) / N.
  """
  del blank_id
  logits, lse, compact, compact_grad, columns, first, temper, ok = residuals
  nll_bar, mean_bar = cotangents
  _, n, v = logits.shape
  nll_bar = jnp.where(ok, nll_bar, 0.0)[:, None, None]
  mean_bar = (mean_bar / n)[:, None, None]
  temper = temper[:, None, None]
  scale = temper * (nll_bar - mean_bar)
  offset = temper * mean_bar / vocab_size
  grad = scale * jnp.exp(logits.astype(jnp.float32) - lse[:, :, None]) + offset
  if vocab_size < v:
    grad = jnp.where(jnp.arange(v) < vocab_size, grad, 0.0)
  # Written over the pass above, not added to it: one rounding, and columns of
  # equal id all carry the value of the first.
  special = scale * jnp.exp(compact) + offset + nll_bar * compact_grad
  special = jnp.take_along_axis(special, first[:, None, :], axis=-1)
  grad = jax.lax.platform_dependent(
    grad.astype(logits.dtype),
    columns,
    special.astype(logits.dtype),
    cpu=_write_bits,
    default=_write,
  )
  return grad, None, None, None


ctc_terms = jax.custom_vjp(_terms, nondiff_argnums=(4, 5))
ctc_terms.defvjp(_forward, _backward)


def _columns(
  labels: jax.Array, label_lengths: jax.Array, blank_id: int
) -> tuple[jax.Array, jax.Array]:
  """Vocabulary ids of the compact classes, and the first class of equal id.

  Class 0 is blank, class l+1 the label l. Padding becomes blank.

  Returns:
    int32 [B, L+1] both.
  """
  valid = jnp.arange(labels.shape[1]) < label_lengths[:, None]
  columns = jnp.pad(
    jnp.where(valid, labels, blank_id).astype(jnp.int32),
    ((0, 0), (1, 0)),
    constant_values=blank_id,
  )
  equal = columns[:, :, None] == columns[:, None, :]
  return columns, jnp.argmax(equal, axis=-1).astype(jnp.int32)


def _summarize(
  logits: jax.Array, columns: jax.Array, *, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """All that the loss needs to know of the logits.

  Args:
    logits: [B, ..., V].
    columns: int32 [B, L+1].
    vocab_size: number of true classes.

  Returns:
    logsumexp and sum over the true classes [B, ...] and the logits at the
    columns [B, ..., L+1], fp32.
  """
  v = logits.shape[-1]
  true_class = jnp.arange(v) < vocab_size

  def masked(x: jax.Array, fill: float) -> jax.Array:
    return x if vocab_size == v else jnp.where(true_class, x, fill)

  # The maximum is exact in the dtype of the logits.
  top = jnp.max(masked(logits, -jnp.inf), axis=-1).astype(jnp.float32)
  z = logits.astype(jnp.float32)
  shifted = masked(z, -jnp.inf) - top[..., None]
  # The select is always true but for NaN. It keeps the exponential in XLA's
  # own parallel loop; the CPU's library for sums would store it for all rows.
  mass = jnp.sum(jnp.where(shifted <= 0, jnp.exp(shifted), jnp.nan), axis=-1)
  gathered = jax.vmap(lambda z, c: z[..., c])(logits, columns)
  total = jnp.sum(masked(z, 0.0), axis=-1)
  return top + jnp.log(mass), total, gathered.astype(jnp.float32)


def _summarize_by_query(
  logits: jax.Array, columns: jax.Array, *, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`_summarize` of [B, N, V], one query at a time.

  On a CPU the exponentials are stored before they are summed; those of one
  query stay in the cache. Reading everything inside the loop also lets the
  gradient take the memory of the logits.
  """

  def one_query(
    carry: None, query: jax.Array
  ) -> tuple[None, tuple[jax.Array, ...]]:
    row = jax.lax.dynamic_index_in_dim(bits, query, 1, keepdims=False)
    row = _from_bits(row, logits.dtype)
    return carry, _summarize(row, columns, vocab_size=vocab_size)

  bits = _to_bits(logits)
  _, (lse, total, gathered) = jax.lax.scan(
    one_query, None, jnp.arange(logits.shape[1])
  )
  return lse.T, total.T, gathered.swapaxes(0, 1)


def _write(x: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
  """Writes values [B, N, L+1] into x [B, N, V] at columns [B, L+1]."""
  return jax.vmap(lambda x, c, y: x.at[:, c].set(y))(x, columns, values)


def _write_bits(
  x: jax.Array, columns: jax.Array, values: jax.Array
) -> jax.Array:
  return _from_bits(_write(_to_bits(x), columns, _to_bits(values)), x.dtype)


def _to_bits(x: jax.Array) -> jax.Array:
  """Half-precision floats as integers, to be moved but not computed with.

  XLA's CPU backend slices and scatters half-precision arrays by way of a
  float32 copy of the whole.
  """
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if _half(x.dtype) else x


def _from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, dtype) if _half(dtype) else x


def _half(dtype: jnp.dtype) -> bool:
  return jnp.dtype(dtype).itemsize == 2


def _compact_ctc(
  log_probs: jax.Array,
  first: jax.Array,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
) -> jax.Array:
  """CTC of the gathered log-probabilities, zero where infeasible.

  `optax.ctc_loss` normalises over the classes it is given. Taking that
  normaliser out again accounts for the mass of all other classes, and for
  tempered log-probabilities, which do not sum to one.

  Args:
    log_probs: [B, N, L+1], blank first.
    first: int32 [B, L+1], see `_columns`.
    labels: [B, L].
    label_lengths: [B].
    temper: [B].

  Returns:
    nll, float32 [B].
  """
  k = log_probs.shape[-1]
  unique = (first == jnp.arange(k))[:, None, :]
  scores = jnp.maximum(temper[:, None, None] * log_probs, _LOG_ZERO)
  scores = jnp.where(unique, scores, _LOG_ZERO)
  paddings = (jnp.arange(k - 1) >= label_lengths[:, None]).astype(jnp.float32)
  # optax looks labels up by a product with one-hot rows, which accelerators
  # would round to bfloat16 or TF32.
  with jax.default_matmul_precision("highest"):
    nll = optax.ctc_loss(
      scores, jnp.zeros(scores.shape[:2]), first[:, 1:], paddings
    )
  nll = nll - jnp.sum(jax.nn.logsumexp(scores, axis=-1), axis=1)
  return jnp.where(feasible(labels, label_lengths, scores.shape[1]), nll, 0.0)
