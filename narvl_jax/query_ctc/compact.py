"""CTC over a large vocabulary by way of the few classes that matter.

A target of L labels touches L+1 classes: blank and the labels. The alignment
is solved on their log-probabilities alone; the gradient goes back to all V
classes in one pass. No array of the size of the logits exists but the
gradient, which XLA may put in their place.

Letters: b batch, n queries, l labels, k = L+1 compact classes, v vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# What optax takes for the logarithm of zero; -inf would give 0 * inf.
_LOG_ZERO = -1e5

# A sum of plain exponentials is as exact as one of shifted ones if no term is
# above exp(_LARGE), so that it is finite, and it is above _SMALL, so that what
# underflowed does not matter.
_LARGE = 60.0
_SMALL = 1e-20


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
  valid = jnp.arange(labels.shape[1]) < label_lengths[:, None]
  # Examples do not interact: the gradient of the sum holds each one's own.
  nll, pull_back = jax.vjp(
    lambda x: _compact_ctc(x, first, valid, temper), compact
  )
  (occupancy,) = pull_back(-jnp.ones_like(nll))
  # The sum over the classes is `temper` but for rounding.
  occupancy /= jnp.maximum(jnp.sum(occupancy, axis=-1, keepdims=True), 1e-6)
  ok = feasible(labels, label_lengths, logits.shape[1])
  nll = jnp.where(ok, nll, 0.0)
  mean = temper * jnp.mean(total / vocab_size - lse, axis=1)
  residuals = (logits, lse, compact, occupancy, columns, first, temper, ok)
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
  logits, lse, compact, occupancy, columns, first, temper, ok = residuals
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
  special = scale * jnp.exp(compact) + offset - nll_bar * temper * occupancy
  special = jnp.take_along_axis(special, first[:, None, :], axis=-1)
  grad = _write(grad.astype(logits.dtype), columns, special)
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
  logits: jax.Array,
  columns: jax.Array,
  *,
  vocab_size: int,
  reduce: Callable[..., jax.Array] = jax.nn.logsumexp,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """All that the loss needs to know of the logits.

  Args:
    logits: [B, N, V].
    columns: int32 [B, L+1].
    vocab_size: number of true classes.
    reduce: what to take of fp32 [B, N, V] over `axis`.

  Returns:
    logsumexp (or `reduce`) and sum over the true classes [B, N] and the
    logits at the columns [B, N, L+1], fp32.
  """
  z = _true_classes(logits, vocab_size, -jnp.inf)
  total = jnp.sum(_true_classes(logits, vocab_size, 0.0), axis=-1)
  gathered = jax.vmap(lambda x, c: x[:, c])(logits, columns)
  return reduce(z, axis=-1), total, gathered.astype(jnp.float32)


def _summarize_by_query(
  logits: jax.Array, columns: jax.Array, *, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`_summarize`, one query at a time.

  On a CPU the exponentials are stored before they are summed; those of one
  query stay in the cache. Reading everything inside the loop also lets the
  gradient take the memory of the logits.
  """

  def scan(of_query: Callable[[jax.Array], Any]) -> Any:
    def step(_: None, query: jax.Array) -> tuple[None, Any]:
      row = jax.lax.dynamic_index_in_dim(bits, query, 1)
      return None, of_query(row.view(logits.dtype))

    bits = _as_bits(logits)
    _, out = jax.lax.scan(step, None, jnp.arange(logits.shape[1]))
    return jax.tree.map(lambda x: x[:, :, 0].swapaxes(0, 1), out)

  def safe() -> jax.Array:
    return scan(
      lambda row: jax.nn.logsumexp(
        _true_classes(row, vocab_size, -jnp.inf), axis=-1
      )
    )

  # Finding the maximum first takes as long as all the rest, and is seldom
  # needed.
  mass, total, gathered = scan(
    functools.partial(
      _summarize, columns=columns, vocab_size=vocab_size, reduce=_sum_exp
    )
  )
  lse = jax.lax.cond(jnp.all(mass > _SMALL), lambda: jnp.log(mass), safe)
  return lse, total, gathered


def _sum_exp(z: jax.Array, axis: int) -> jax.Array:
  """Sum of exp(z); NaN if a term is above exp(_LARGE).

  The select also keeps the exponential in XLA's own parallel loop on a CPU,
  whose library for sums would be slower.
  """
  return jnp.sum(jnp.where(z <= _LARGE, jnp.exp(z), jnp.nan), axis=axis)


def _true_classes(x: jax.Array, vocab_size: int, fill: float) -> jax.Array:
  """Returns x [..., V] in fp32, with `fill` in the padding of the table."""
  x = x.astype(jnp.float32)
  if vocab_size == x.shape[-1]:
    return x
  return jnp.where(jnp.arange(x.shape[-1]) < vocab_size, x, fill)


def _write(x: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
  """Writes values [B, N, L+1] into x [B, N, V] at columns [B, L+1]."""
  bits = jax.vmap(lambda x, c, y: x.at[:, c].set(y))(
    _as_bits(x), columns, _as_bits(values.astype(x.dtype))
  )
  return bits.view(x.dtype)


def _as_bits(x: jax.Array) -> jax.Array:
  """Half-precision floats as integers, to be moved but not computed with.

  XLA's CPU backend slices and scatters half-precision arrays by way of a
  float32 copy of the whole.
  """
  return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


def _compact_ctc(
  log_probs: jax.Array, first: jax.Array, valid: jax.Array, temper: jax.Array
) -> jax.Array:
  """CTC of the gathered log-probabilities.

  `optax.ctc_loss` normalises over the classes it is given. Taking that
  normaliser out again accounts for the mass of all other classes, and for
  tempered log-probabilities, which do not sum to one. Its gradient nearly
  cancels in the same way; one more class of constant weight 1, which no label
  uses, keeps the part that cancels as small as the probabilities themselves.

  Args:
    log_probs: [B, N, L+1], blank first.
    first: int32 [B, L+1], see `_columns`.
    valid: bool [B, L], False for padding.
    temper: [B].

  Returns:
    nll, float32 [B]; without meaning where infeasible.
  """
  unique = first == jnp.arange(first.shape[1])
  scores = jnp.maximum(temper[:, None, None] * log_probs, _LOG_ZERO)
  scores = jnp.where(unique[:, None, :], scores, _LOG_ZERO)
  scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 1)))
  # optax looks labels up by a product with one-hot rows, which accelerators
  # would round to bfloat16 or TF32.
  with jax.default_matmul_precision("highest"):
    nll = optax.ctc_loss(
      scores,
      jnp.zeros(scores.shape[:2]),
      first[:, 1:],
      1.0 - valid.astype(jnp.float32),
    )
  return nll - jnp.sum(jax.nn.logsumexp(scores, axis=-1), axis=1)
