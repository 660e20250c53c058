"""Label-smoothed cross-entropy, the loss of the autoregressive model."""

import jax
import jax.numpy as jnp

# Finite, so that no difference of two of them is NaN.
_NEVER = -1e9


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
    "nll_per_example" float32 [B] (mean over the example's labels).

  Source: the official criterion label_smoothed_cross_entropy (reference
  specification 11.2).
  """
  logits = logits.astype(jnp.float32)
  batch, length, classes = logits.shape
  size = classes if vocab_size is None else vocab_size
  inside = jnp.arange(classes) < size
  inside = inside if allowed is None else inside & allowed
  log_probs = jax.nn.log_softmax(jnp.where(inside, logits, _NEVER))
  # Not a lookup: where the classes are split over devices they stay there.
  here = labels[..., None] == jnp.arange(classes)
  nll = -jnp.sum(jnp.where(here, log_probs, 0.0), axis=-1)
  count = jnp.sum(jnp.broadcast_to(inside, logits.shape), axis=-1)
  smooth = -jnp.sum(jnp.where(inside, log_probs, 0.0), axis=-1)
  spread = label_smoothing / jnp.maximum(count - 1, 1)
  loss = (1 - label_smoothing - spread) * nll + spread * smooth

  valid = jnp.arange(length) < label_lengths[:, None]
  if example_mask is not None:
    valid &= example_mask[:, None]
  if confidence is not None:
    nll, loss = (x * confidence[:, None] for x in (nll, loss))
  share = jnp.ones(batch)
  if average == "examples":
    share = 1.0 / jnp.maximum(label_lengths, 1)

  def mean(x: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    shares = jnp.where(kept, share[:, None], 0.0)
    weight = jnp.sum(shares)
    # The least that a label can weigh, so that only zero is divided by more.
    least = 1.0 / length
    return jnp.sum(shares * x) / jnp.maximum(weight, least), weight

  loss, weight = mean(loss, _keep_best(loss, valid, drop_worst))
  nll = jnp.where(valid, nll, 0.0)
  examples = jnp.ones(batch) if example_mask is None else example_mask
  metrics = {
    "loss": loss,
    "nll": mean(nll, valid)[0],
    "infeasible_fraction": jnp.zeros(()),
    "examples": jnp.sum(examples.astype(jnp.float32)),
    "weight": weight,
    "nll_per_example": jnp.sum(nll, axis=1) / jnp.maximum(label_lengths, 1),
  }
  return loss, jax.lax.stop_gradient(metrics)


def _keep_best(
  loss: jax.Array, valid: jax.Array, drop_worst: float | jax.Array
) -> jax.Array:
  """Returns bool [B, L], the valid labels but for the share that is worst."""
  if isinstance(drop_worst, float) and not drop_worst:
    return valid
  flat = jnp.where(valid, jax.lax.stop_gradient(loss), jnp.inf).reshape(-1)
  number = jnp.sum(valid)
  keep = jnp.floor(number * (1.0 - jnp.asarray(drop_worst))).astype(jnp.int32)
  rank = jnp.zeros(flat.size, jnp.int32)
  rank = rank.at[jnp.argsort(flat)].set(jnp.arange(flat.size))
  return valid & (rank < keep).reshape(valid.shape)
