"""Query-CTC: CTC over the N parallel queries of the decoder.

The alignment needs only `logsumexp` of a query's logits and its
log-probabilities at blank and at the L labels. They are gathered into a
compact alphabet of L+1 classes that `optax.ctc_loss` solves; the gradient
returns to the V classes in one pass. Whatever the size of the vocabulary, no
array of the size of the logits exists but the gradient.

Letters: b batch, n queries, l labels, k = L+1 compact classes, v vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from narvl_jax.errors import UserError, did_you_mean

CONFIDENCE_MODES = ("weight", "temper")

# What optax takes for the logarithm of zero; -inf would give 0 * inf.
_LOG_ZERO = -1e5


def query_ctc_loss(
  logits: jax.Array,
  labels: jax.Array,
  label_lengths: jax.Array,
  *,
  blank_id: int,
  vocab_size: int | None = None,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Negative log-likelihood of the labels over all CTC alignments.

  An infeasible target (see `feasible`) has zero loss and zero gradient. With
  `label_smoothing` e the loss is `(1 - e) * nll - e * m`, m being the mean
  log-probability over all queries and classes; m also acts on infeasible
  targets. The loss is not divided by the target length; `query_ctc_objective`
  does that.

  Works under `jit`, `vmap` and sharding over the batch. Only first-order
  reverse-mode differentiation with respect to `logits` is defined; the
  gradient has the dtype of `logits`, all sums are fp32.

  Args:
    logits: [B, N, V], unnormalised, any float dtype.
    labels: [B, L] integers, right padded with any id; blank is not a label.
    label_lengths: [B] integers, 0 for an empty target.
    blank_id: id of the blank class.
    vocab_size: number of true classes; logits at and after it are padding of
      the table and take no part. None: all V classes are true.
    label_smoothing: in [0, 1).

  Returns:
    Loss per example, float32 [B].

  Raises:
    UserError: `blank_id`, `vocab_size` or `label_smoothing` out of range.

  Source: Graves et al. 2006, equations 6-8 and 16; NARVL (arXiv 2403.02249),
  section 3.3.
  """
  _check(logits, labels, blank_id, vocab_size, label_smoothing)
  ones = jnp.ones(logits.shape[:1], jnp.float32)
  nll, mean_log_prob = _ctc(
    logits, labels, label_lengths, ones, blank_id, vocab_size
  )
  return _smooth(nll, mean_log_prob, label_smoothing)


def query_ctc_objective(
  logits: jax.Array,
  labels: jax.Array,
  label_lengths: jax.Array,
  *,
  blank_id: int,
  vocab_size: int | None = None,
  label_smoothing: float = 0.0,
  confidence: jax.Array | None = None,
  confidence_mode: str = "weight",
  example_mask: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Training objective of a batch and what to log about it.

  Per example: the nll divided by the target length (at least 1), smoothed as
  in `query_ctc_loss`. The objective is the mean over the examples with
  `example_mask`; infeasible targets count as zero but stay in the divisor.

  `confidence` c of a target acts in one of two ways:
    weight: c multiplies the loss of the example.
    temper: c multiplies the log-probabilities before the alignment is summed
      and they are not renormalised, as the official code does. The value is
      the official one; the gradient is that of the value, whereas PyTorch's
      CTC returns another one wherever c is not 1.
  No gradient flows into `confidence`.

  To weight micro-batches in gradient accumulation, multiply the gradient by
  `metrics["examples"]`, add up, and divide by the summed `examples`.

  Args:
    logits: [B, N, V], unnormalised, any float dtype.
    labels: [B, L] integers, right padded with any id.
    label_lengths: [B] integers.
    blank_id: id of the blank class.
    vocab_size: number of true classes, None for all V.
    label_smoothing: in [0, 1).
    confidence: [B] in (0, 1], None for 1.
    confidence_mode: one of `CONFIDENCE_MODES`.
    example_mask: [B] bool or weights, False for rows that only fill the
      batch; None for all True.

  Returns:
    The objective (float32 scalar) and float32 scalars: `loss` (the same),
    `nll` (mean nll per label, without smoothing and, in mode "weight",
    without confidence), `infeasible_fraction`, `examples` (sum of the mask).

  Raises:
    UserError: an argument out of range or an unknown `confidence_mode`.
  """
  _check(logits, labels, blank_id, vocab_size, label_smoothing)
  if confidence_mode not in CONFIDENCE_MODES:
    raise UserError(
      f'unknown confidence mode "{confidence_mode}".'
      f"{did_you_mean(confidence_mode, CONFIDENCE_MODES)}"
      " Set --config.loss.confidence"
    )
  batch = logits.shape[:1]
  if confidence is None:
    confidence = jnp.ones(batch, jnp.float32)
  if example_mask is None:
    example_mask = jnp.ones(batch, jnp.float32)
  weights = example_mask.astype(jnp.float32)
  confidence = jax.lax.stop_gradient(confidence.astype(jnp.float32))
  temper = confidence_mode == "temper"

  nll, mean_log_prob = _ctc(
    logits,
    labels,
    label_lengths,
    confidence if temper else jnp.ones(batch, jnp.float32),
    blank_id,
    vocab_size,
  )
  nll = nll / jnp.maximum(label_lengths, 1)
  losses = _smooth(nll, mean_log_prob, label_smoothing)
  if not temper:
    losses = losses * confidence

  examples = jnp.sum(weights)

  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(weights * x) / jnp.maximum(examples, 1.0)

  loss = mean(losses)
  infeasible = ~feasible(labels, label_lengths, logits.shape[1])
  metrics = {
    "loss": loss,
    "nll": mean(nll),
    "infeasible_fraction": mean(infeasible.astype(jnp.float32)),
    "examples": examples,
  }
  return loss, jax.lax.stop_gradient(metrics)


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


def _smooth(
  nll: jax.Array, mean_log_prob: jax.Array, label_smoothing: float
) -> jax.Array:
  if label_smoothing == 0.0:
    return nll
  return (1.0 - label_smoothing) * nll - label_smoothing * mean_log_prob


def _check(
  logits: jax.Array,
  labels: jax.Array,
  blank_id: int,
  vocab_size: int | None,
  label_smoothing: float,
) -> None:
  """Rejects what static shapes and Python numbers already show to be wrong."""
  if logits.ndim != 3 or labels.ndim != 2 or len(logits) != len(labels):
    raise UserError(
      "query_ctc_loss needs logits [B, N, V] and labels [B, L], got"
      f" {logits.shape} and {labels.shape}"
    )
  classes = logits.shape[-1]
  size = classes if vocab_size is None else vocab_size
  if not 0 < size <= classes:
    raise UserError(
      f"vocab_size {size} does not fit logits of {classes} classes;"
      f" give 1 to {classes}"
    )
  if not 0 <= blank_id < size:
    raise UserError(f"blank_id {blank_id} is not a class; give 0 to {size - 1}")
  if not 0.0 <= label_smoothing < 1.0:
    raise UserError(
      f"label smoothing {label_smoothing} is outside [0, 1); set"
      " --config.loss.label_smoothing, for example to 0.1"
    )


# The core: per-example nll and mean log-probability with one joint gradient.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ctc(
  logits: jax.Array,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
  blank_id: int,
  vocab_size: int | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns nll [B] and mean log-probability [B], log-probs times temper."""
  columns, first = _columns(labels, label_lengths, blank_id)
  lse, mean_logit = _reduce(logits, vocab_size)
  compact = _gather(logits, columns) - lse[:, :, None]
  nll = _compact_ctc(compact, first, labels, label_lengths, temper)
  return nll, temper * (mean_logit - jnp.mean(lse, axis=1))


def _ctc_forward(
  logits: jax.Array,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
  blank_id: int,
  vocab_size: int | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
  columns, first = _columns(labels, label_lengths, blank_id)
  lse, mean_logit = _reduce(logits, vocab_size)
  compact = _gather(logits, columns) - lse[:, :, None]
  # Rows do not interact, so the gradient of the sum holds each row's own.
  nll, pull = jax.vjp(
    lambda x: _compact_ctc(x, first, labels, label_lengths, temper), compact
  )
  (compact_grad,) = pull(jnp.ones_like(nll))
  outputs = nll, temper * (mean_logit - jnp.mean(lse, axis=1))
  ok = feasible(labels, label_lengths, logits.shape[1])
  residuals = (logits, lse, compact, compact_grad, columns, first, temper, ok)
  return outputs, residuals


def _ctc_backward(
  blank_id: int,
  vocab_size: int | None,
  residuals: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, None, None, None]:
  """Gradient s * softmax(z) + o everywhere, with the occupancy at k columns."""
  del blank_id
  logits, lse, compact, compact_grad, columns, first, temper, ok = residuals
  nll_bar, mean_bar = cotangents
  _, n, v = logits.shape
  size = v if vocab_size is None else vocab_size
  nll_bar = jnp.where(ok, nll_bar, 0.0)
  # d nll / dz = c * (softmax - occupancy), d mean / dz = c * (1/V - softmax)/N
  scale = (temper * (nll_bar - mean_bar / n))[:, None, None]
  offset = (temper * mean_bar / (n * size))[:, None, None]
  grad = scale * jnp.exp(logits.astype(jnp.float32) - lse[:, :, None]) + offset
  if size < v:
    grad = jnp.where(jnp.arange(v) < size, grad, 0.0)
  grad = grad.astype(logits.dtype)
  # The columns are written, not added to: one rounding, and equal columns
  # (which carry the value of the first) stay right.
  at = scale * jnp.exp(compact) + offset + nll_bar[:, None, None] * compact_grad
  at = jnp.take_along_axis(at, first[:, None, :], axis=-1)
  grad = jax.vmap(lambda g, c, x: g.at[:, c].set(x.astype(g.dtype)))(
    grad, columns, at
  )
  return grad, None, None, None


_ctc.defvjp(_ctc_forward, _ctc_backward)


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


def _reduce(
  logits: jax.Array, vocab_size: int | None
) -> tuple[jax.Array, jax.Array]:
  """logsumexp [B, N] and mean logit [B] over the true classes, fp32."""
  v = logits.shape[-1]
  size = v if vocab_size is None else vocab_size
  true = jnp.arange(v) < size

  def masked(x: jax.Array, fill: float) -> jax.Array:
    return x if size == v else jnp.where(true, x, fill)

  # The maximum is exact in the dtype of the logits.
  top = jnp.max(masked(logits, -jnp.inf), axis=-1).astype(jnp.float32)
  z = logits.astype(jnp.float32)
  mass = jnp.sum(masked(jnp.exp(z - top[..., None]), 0.0), axis=-1)
  mean = jnp.sum(masked(z, 0.0), axis=(1, 2)) / (logits.shape[1] * size)
  return top + jnp.log(mass), mean


def _gather(logits: jax.Array, columns: jax.Array) -> jax.Array:
  """Logits [B, N, L+1] at the columns [B, L+1], fp32."""
  return jax.vmap(lambda z, c: z[:, c])(logits, columns).astype(jnp.float32)


def _compact_ctc(
  log_probs: jax.Array,
  first: jax.Array,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
) -> jax.Array:
  """CTC of the gathered log-probabilities, zero where infeasible.

  `optax.ctc_loss` normalises over the classes it is given; adding the
  normaliser back restores the mass of all other classes (and the missing mass
  of tempered log-probabilities) exactly.

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
  # would round to bfloat16.
  with jax.default_matmul_precision("highest"):
    nll = optax.ctc_loss(
      scores, jnp.zeros(scores.shape[:2]), first[:, 1:], paddings
    )
  nll = nll - jnp.sum(jax.nn.logsumexp(scores, axis=-1), axis=1)
  return jnp.where(feasible(labels, label_lengths, scores.shape[1]), nll, 0.0)
