"""Label-smoothed cross-entropy, the loss of the autoregressive model.

Letters: b batch, l labels, v classes of the padded vocabulary.
"""

import jax
import jax.numpy as jnp

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config_table import KEYS
from narvl_jax.query_ctc.targets import (
  as_int32,
  check_classes,
  check_smoothing,
  check_targets,
  is_target,
)

AVERAGES = KEYS["loss.average"].choices


def label_smoothed_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  label_lengths: jax.Array,
  *,
  vocab_size: int | None = None,
  label_smoothing: float = 0.0,
  confidence: jax.Array | None = None,
  example_mask: jax.Array | None = None,
  allowed: jax.Array | None = None,
  drop_worst: float | jax.Array = 0.0,
  average: str = "labels",
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of each label, averaged over the batch.

  A label costs (1 - e - e') nll + e' sum(-log p), where the sum runs over all
  classes and e' is e / (V - 1), or over the A allowed ones and e' is
  e / (A - 1). Edge cases:

  * Finite logits of any size give the right loss in float32. A logit of -inf is
    a class of probability zero: a label there costs +inf, and with label
    smoothing every label of that position does.
  * Labels beyond `label_lengths` and rows outside of `example_mask` contribute
    nothing to loss and gradient, whatever their logits are.
  * A label outside of 0..vocab_size - 1, or a length outside of 0..L, makes the
    loss NaN, or raises `UserError` if the values are known before tracing. A
    label that is not allowed costs +inf.
  * A logit of NaN or +inf at a label makes the loss NaN; `drop_worst` never
    drops such a label.
  * B = 0 and L = 0 are allowed: the loss is 0.

  Args:
    logits: [B, L, V] float, logits that predict the labels.
    labels: int32 [B, L], right padded.
    label_lengths: int32 [B].
    vocab_size: number of true classes, which come first; None for V.
    label_smoothing: e, in [0, 1).
    confidence: float32 [B], weight of each example's labels; None: 1.
    example_mask: bool [B], False for rows that only fill the batch; None: all.
    allowed: bool [B, L, V], classes that a constraint allows at each label; the
      others have probability zero. None: all.
    drop_worst: share of the labels with the largest loss that is dropped, for
      noisy targets.
    average: "labels", so that long targets weigh more (reference), or
      "examples", each of which weighs as the mean of its labels.

  Returns:
    The loss, and float32 metrics: "loss", "nll" (averaged alike, natural log,
    times confidence), "infeasible_fraction" (0, since every target can be
    written), "examples", "weight" (labels or examples that count) and
    "nll_per_example" [B] (mean over the example's labels).

  Raises:
    UserError: a wrong shape or dtype, an unknown `average`, `vocab_size` or
      `label_smoothing` out of range, or a wrong target known before tracing.

  Source: the official criterion label_smoothed_cross_entropy (reference
  specification 11.2).
  """
  if logits.ndim != 3 or labels.shape != logits.shape[:2]:
    raise UserError(
      "the cross-entropy needs logits [B, L, V] and labels [B, L], got"
      f" {logits.shape} and {labels.shape}"
    )
  if average not in AVERAGES:
    raise UserError(
      f'unknown average "{average}".{did_you_mean(average, AVERAGES)}'
      " Set --config.loss.average"
    )
  batch, length, classes = logits.shape
  size = check_classes(classes, vocab_size)
  check_smoothing(label_smoothing)
  check_targets(
    labels,
    label_lengths,
    size,
    example_mask=example_mask,
    confidence=confidence,
  )
  labels, label_lengths = as_int32(labels), as_int32(label_lengths)
  mask = (
    jnp.ones(batch, bool) if example_mask is None else example_mask.astype(bool)
  )
  valid = (jnp.arange(length) < label_lengths[:, None]) & mask[:, None]
  inside = jnp.arange(classes) < size
  inside = inside if allowed is None else inside & allowed
  nll, loss = _per_label(logits, labels, valid, inside, label_smoothing)
  if confidence is not None:
    confidence = jnp.where(mask, confidence.astype(jnp.float32), 1.0)
    nll, loss = (x * confidence[:, None] for x in (nll, loss))

  wrong = mask & ~is_target(labels, label_lengths, size)
  shares = jnp.ones((batch, length), jnp.float32)
  if average == "examples":
    shares = shares / jnp.maximum(label_lengths, 1)[:, None]
  loss, weight = _mean(loss, shares * _keep_best(loss, valid, drop_worst))
  nll = jnp.where(valid, nll, 0.0)
  metrics = {
    "loss": jnp.where(jnp.any(wrong), jnp.nan, loss),
    "nll": jnp.where(jnp.any(wrong), jnp.nan, _mean(nll, shares * valid)[0]),
    "infeasible_fraction": jnp.zeros((), jnp.float32),
    "examples": jnp.sum(mask, dtype=jnp.float32),
    "weight": weight,
    "nll_per_example": jnp.where(
      wrong, jnp.nan, jnp.sum(nll, axis=1) / jnp.maximum(label_lengths, 1)
    ),
  }
  return metrics["loss"], jax.lax.stop_gradient(metrics)


def _per_label(
  logits: jax.Array,
  labels: jax.Array,
  valid: jax.Array,
  inside: jax.Array,
  label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns nll and smoothed loss, float32 [B, L].

  `inside` [..., V] marks the classes with a probability above zero.
  """
  # Positions that do not count must not give NaN, whose gradient is not zero.
  logits = jnp.where(valid[..., None], logits.astype(jnp.float32), 0.0)
  inside = jnp.broadcast_to(inside, logits.shape) | ~valid[..., None]
  log_probs = jax.nn.log_softmax(jnp.where(inside, logits, -jnp.inf))
  # Not a lookup: where the classes are split over devices they stay there.
  here = labels[..., None] == jnp.arange(logits.shape[-1])
  nll = -jnp.sum(jnp.where(here, log_probs, 0.0), axis=-1)
  if not label_smoothing:
    return nll, nll
  count = jnp.sum(inside, axis=-1)
  smooth = -jnp.sum(jnp.where(inside, log_probs, 0.0), axis=-1)
  spread = label_smoothing / jnp.maximum(count - 1, 1)
  return nll, (1 - label_smoothing - spread) * nll + spread * smooth


def _mean(x: jax.Array, shares: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the mean of x [B, L] weighted by `shares`, and their sum."""
  weight = jnp.sum(shares)
  # The least positive weight of a label, so that only 0 / 0 is changed.
  least = 1.0 / max(x.shape[1], 1)
  total = jnp.sum(jnp.where(shares > 0, shares * x, 0.0))
  return total / jnp.maximum(weight, least), weight


def _keep_best(
  loss: jax.Array, valid: jax.Array, drop_worst: float | jax.Array
) -> jax.Array:
  """Returns bool [B, L], the valid labels without the worst share."""
  if isinstance(drop_worst, float) and not drop_worst:
    return valid
  loss = jax.lax.stop_gradient(loss)
  flat = jnp.where(valid, loss, jnp.inf).reshape(-1)
  number = jnp.sum(valid)
  keep = jnp.floor(number * (1.0 - jnp.asarray(drop_worst))).astype(jnp.int32)
  rank = jnp.zeros(flat.size, jnp.int32)
  rank = rank.at[jnp.argsort(flat)].set(jnp.arange(flat.size, dtype=jnp.int32))
  # NaN ranks last, but must be seen.
  return valid & ((rank < keep).reshape(valid.shape) | jnp.isnan(loss))
