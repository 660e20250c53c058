"""Label-smoothed cross-entropy, the loss of the autoregressive model."""

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
  classes and e' is e / (V - 1), or over the allowed ones and e / (A - 1).

  What happens at the edges:

  * Logits of any finite magnitude give the right loss, to the precision of
    float32. -inf is a class of probability zero: a label there costs +inf, and
    with label smoothing every label of that place does.
  * Labels beyond `label_lengths` and rows without `example_mask` add nothing
    to loss and gradient, whatever their logits hold.
  * An example of which a label is no class below `vocab_size`, or whose length
    is outside 0..L, makes the loss NaN; where the values are known before
    tracing it is a `UserError`. A label that is not allowed costs +inf.
  * A logit of NaN or +inf at a label makes the loss NaN; such a label is never
    among those that `drop_worst` leaves out.
  * B = 0 and L = 0 are allowed: the loss is 0.

  The training step skips an update whose loss or gradient is not finite, or
  ends the run: `config.bad_numbers`.

  Args:
    logits: [B, L, V] float, logits that predict the labels.
    labels: int32 [B, L], right padded.
    label_lengths: int32 [B].
    vocab_size: number of true classes, those after it pad the table; None for
      all V.
    label_smoothing: e, in [0, 1).
    confidence: float32 [B], weight of each example's labels; None: 1.
    example_mask: bool [B], False for rows that only fill the batch; None: all.
    allowed: bool [B, L, V], classes that a constraint leaves at each label;
      the others count for nothing. None: all.
    drop_worst: share of the labels, those with the largest loss, that are left
      out, for targets that may be wrong.
    average: "labels", so that long targets count for more (reference), or
      "examples", of which each counts as the mean of its labels.

  Returns:
    The loss, and metrics: "loss", "nll" (averaged alike, natural log, times
    confidence), "infeasible_fraction" (always 0, every target can be written
    token by token), "examples", "weight" (labels or examples that count) and
    "nll_per_example" float32 [B] (mean over the example's labels). All are
    float32, also with `jax_enable_x64`.

  Raises:
    UserError: a wrong shape or dtype, an unknown `average`, `vocab_size` or
      `label_smoothing` out of range, or a wrong target that is known before
      tracing.

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
  # What does not count must not give NaN, of which no gradient is zero.
  logits = jnp.where(valid[..., None], logits.astype(jnp.float32), 0.0)
  inside = jnp.broadcast_to(inside, logits.shape) | ~valid[..., None]
  log_probs = jax.nn.log_softmax(jnp.where(inside, logits, -jnp.inf))
  # Not a lookup: where the classes are split over devices they stay there.
  here = labels[..., None] == jnp.arange(classes)
  nll = -jnp.sum(jnp.where(here, log_probs, 0.0), axis=-1)
  loss = nll
  if label_smoothing:
    count = jnp.sum(inside, axis=-1)
    smooth = -jnp.sum(jnp.where(inside, log_probs, 0.0), axis=-1)
    spread = label_smoothing / jnp.maximum(count - 1, 1)
    loss = (1 - label_smoothing - spread) * nll + spread * smooth
  if confidence is not None:
    confidence = jnp.where(mask, confidence.astype(jnp.float32), 1.0)
    nll, loss = (x * confidence[:, None] for x in (nll, loss))
  # What is no target must not look like one.
  wrong = mask & ~is_target(labels, label_lengths, size)
  share = jnp.ones(batch, jnp.float32)
  if average == "examples":
    share = share / jnp.maximum(label_lengths, 1)

  def mean(x: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    shares = jnp.where(kept, share[:, None], 0.0)
    weight = jnp.sum(shares)
    # The least that a label can weigh, so that only zero is divided by more.
    least = 1.0 / max(length, 1)
    total = jnp.sum(jnp.where(kept, shares * x, 0.0))
    total = jnp.where(jnp.any(wrong), jnp.nan, total)
    return total / jnp.maximum(weight, least), weight

  loss, weight = mean(loss, _keep_best(loss, valid, drop_worst))
  nll = jnp.where(valid, nll, 0.0)
  per_example = jnp.sum(nll, axis=1) / jnp.maximum(label_lengths, 1)
  metrics = {
    "loss": loss,
    "nll": mean(nll, valid)[0],
    "infeasible_fraction": jnp.zeros((), jnp.float32),
    "examples": jnp.sum(mask, dtype=jnp.float32),
    "weight": weight,
    "nll_per_example": jnp.where(wrong, jnp.nan, per_example),
  }
  return loss, jax.lax.stop_gradient(metrics)


def _keep_best(
  loss: jax.Array, valid: jax.Array, drop_worst: float | jax.Array
) -> jax.Array:
  """Returns bool [B, L], the valid labels but for the share that is worst."""
  if isinstance(drop_worst, float) and not drop_worst:
    return valid
  loss = jax.lax.stop_gradient(loss)
  flat = jnp.where(valid, loss, jnp.inf).reshape(-1)
  number = jnp.sum(valid)
  keep = jnp.floor(number * (1.0 - jnp.asarray(drop_worst))).astype(jnp.int32)
  rank = jnp.zeros(flat.size, jnp.int32)
  rank = rank.at[jnp.argsort(flat)].set(jnp.arange(flat.size, dtype=jnp.int32))
  # NaN ranks last, but must not go unseen.
  return valid & ((rank < keep).reshape(valid.shape) | jnp.isnan(loss))
