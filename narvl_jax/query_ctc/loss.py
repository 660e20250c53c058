"""Query-CTC: CTC over the N parallel queries of the decoder.

A decoder of N queries predicts N distributions over the vocabulary and blank
in one pass. The loss is the negative log-likelihood of the target, summed over
all its alignments with the queries. `compact.py` computes it.

Both functions also take `ChunkedLogits`, that is decoder states and vocabulary
table, and then never compute [B, N, V] as a whole. The objective computes its
gradient together with its value. With `MeshAxes` the vocabulary may be split
over the devices of a mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.query_ctc.axes import MeshAxes, split_of
from narvl_jax.query_ctc.chunked import (
  ChunkedHead,
  ChunkedLogits,
  weighted_terms,
)
from narvl_jax.query_ctc.compact import Head, ctc_terms
from narvl_jax.query_ctc.dense import DenseHead
from narvl_jax.query_ctc.targets import (
  as_int32,
  check_classes,
  check_smoothing,
  check_targets,
  feasible,
  is_target,
)

CONFIDENCE_MODES = ("weight", "temper")

_WHOLE = MeshAxes()


def query_ctc_loss(
  logits: jax.Array | ChunkedLogits,
  labels: jax.Array,
  label_lengths: jax.Array,
  *,
  blank_id: int,
  vocab_size: int | None = None,
  label_smoothing: float = 0.0,
  axes: MeshAxes = _WHOLE,
) -> jax.Array:
  """Negative log-likelihood of the labels over all CTC alignments.

  With `label_smoothing` e the loss is `(1 - e) * nll - e * m`, where m is the
  mean log-probability over all queries and classes. The loss is not divided by
  the target length; `query_ctc_objective` does that.

  Special cases are the same for whole logits and `ChunkedLogits`, one device
  and a split vocabulary, and all float dtypes:

  * Logits of any finite magnitude give the right loss to the precision of
    float32, and +inf if it exceeds 3.4e38. So do gradients, except that where
    log-probabilities exceed about 1e6 in magnitude, alignments of equal
    likelihood may get unequal shares of the gradient. (`label_posterior` has
    no such limit.)
  * An infeasible target (see `feasible`) has zero nll and zero gradient
    for any logits. Only m contributes.
  * A target is invalid if a label is blank or not below `vocab_size`, or if
    its length is outside 0..L. It is a `UserError` if its values are known
    before tracing; otherwise loss and gradient of its example are NaN.
  * A logit of -inf is a class of probability zero. A feasible target that
    needs it in every alignment has loss +inf and a NaN gradient. With label
    smoothing, m of the example is -inf.
  * A logit of NaN or +inf, or a query whose logits are all -inf, makes loss
    and gradient of its example NaN, unless the target is infeasible.
  * Logits from `vocab_size` on may contain anything.
  * B = 0 and L = 0 are allowed; N = 0 is a `UserError`.

  Works under `jit`, `vmap` and sharding over the batch. Only first-order
  reverse-mode differentiation with respect to `logits` is defined. The
  gradient has the dtype of `logits`; all sums are float32.

  Args:
    logits: [B, N, V], unnormalised, any float dtype; or `ChunkedLogits`.
    labels: [B, L] integers, right padded with any id; blank is not a label.
    label_lengths: [B] integers, 0 for an empty target.
    blank_id: id of the blank class.
    vocab_size: number of true classes; later ones are padding of the table
      and are ignored. None for all V.
    label_smoothing: label smoothing in [0, 1).
    axes: mesh axes that split batch and classes.

  Returns:
    Loss per example, float32 [B], also with `jax_enable_x64`.

  Raises:
    UserError: a wrong shape or dtype; `blank_id`, `vocab_size`,
      `label_smoothing` or chunk size out of range; a wrong target that is
      known before tracing; or classes that do not divide by their axis.

  Source: Graves et al. 2006, section 4; NARVL (arXiv 2403.02249).
  """
  size = check_input(logits, labels, label_lengths, blank_id, vocab_size)
  check_smoothing(label_smoothing)
  labels, label_lengths = as_int32(labels), as_int32(label_lengths)
  ones = jnp.ones(logits.shape[:1], jnp.float32)
  nll, mean_log_prob = _terms(
    logits, labels, label_lengths, ones, blank_id, size, axes
  )
  return _smooth(nll, mean_log_prob, label_smoothing)


def query_ctc_objective(
  logits: jax.Array | ChunkedLogits,
  labels: jax.Array,
  label_lengths: jax.Array,
  *,
  blank_id: int,
  vocab_size: int | None = None,
  label_smoothing: float = 0.0,
  confidence: jax.Array | None = None,
  confidence_mode: str = "weight",
  example_mask: jax.Array | None = None,
  axes: MeshAxes = _WHOLE,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Training objective of a batch, and its metrics.

  The nll of an example is divided by its target length (at least 1) and
  smoothed as in `query_ctc_loss`. The objective is the mean over the examples
  in `example_mask`; the others contribute nothing to it or to its gradient,
  with any content. Infeasible targets have zero nll and count in the mean.

  To weight micro-batches in gradient accumulation, sum the gradients times
  `metrics["examples"]`, and divide by the sum of `examples`.

  `confidence` c of a target acts in one of two ways, and gets no gradient:

    weight: c multiplies the loss of the example.
    temper: c multiplies the log-probabilities before the alignments are
      summed, without renormalising them. The value is that of the official
      code. The gradient is that of the value; PyTorch's CTC returns a
      different one wherever c is not 1.

  Args:
    logits: as in `query_ctc_loss`; so are the next five arguments.
    confidence: [B] in (0, 1], None for 1.
    confidence_mode: one of `CONFIDENCE_MODES`.
    example_mask: [B] bool, False for rows that only fill the batch; None for
      all True.
    axes: mesh axes that split batch and classes.

  Returns:
    The objective, a float32 scalar, and a dict without gradient: the float32
    scalars `loss` (the objective), `nll` (mean of the nll per label, without
    smoothing and, in mode "weight", without confidence),
    `infeasible_fraction` and `examples` (sum of the mask), and
    `nll_per_example`, float32 [B], the terms of `nll`.

  Raises:
    UserError: see `query_ctc_loss`, or an unknown `confidence_mode`.

  Source: the official criterion (value in mode "temper"); NARVL
  (arXiv 2403.02249).
  """
  size = check_input(
    logits,
    labels,
    label_lengths,
    blank_id,
    vocab_size,
    example_mask=example_mask,
    confidence=confidence,
  )
  check_smoothing(label_smoothing)
  labels, label_lengths = as_int32(labels), as_int32(label_lengths)
  ones = jnp.ones(logits.shape[:1], jnp.float32)
  weight, temper = _split_confidence(confidence, confidence_mode, ones)
  mask = ones > 0 if example_mask is None else example_mask.astype(bool)
  examples = jnp.sum(mask, dtype=jnp.float32)

  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(examples, 1.0)

  weight = jnp.where(mask, jax.lax.stop_gradient(weight), 0.0)
  per_label = jnp.maximum(label_lengths, 1)
  if isinstance(logits, ChunkedLogits):
    head, inputs = make_head(logits, size, axes)
    assert isinstance(head, ChunkedHead)
    share = weight / jnp.maximum(examples, 1.0)
    weights = (
      (1.0 - label_smoothing) * share / per_label,
      -label_smoothing * share,
    )
    found: Any = weighted_terms(
      head, blank_id, inputs, labels, label_lengths, temper, *weights
    )
    loss, nll, _ = found
    nll = nll / per_label
  else:
    nll, mean_log_prob = _terms(
      logits, labels, label_lengths, temper, blank_id, size, axes
    )
    nll = nll / per_label
    losses = _smooth(nll, mean_log_prob, label_smoothing)
    loss = mean(weight * losses)
  infeasible = ~feasible(labels, label_lengths, logits.shape[1])
  infeasible &= is_target(labels, label_lengths, size, blank_id)
  metrics = {
    "loss": loss,
    "nll": mean(nll),
    "infeasible_fraction": mean(infeasible.astype(jnp.float32)),
    "examples": examples,
    "nll_per_example": nll,
  }
  return loss, jax.lax.stop_gradient(metrics)


def _split_confidence(
  confidence: jax.Array | None, mode: str, ones: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns factors [B] of the losses and of the log-probabilities."""
  if mode not in CONFIDENCE_MODES:
    raise UserError(
      f'unknown confidence mode "{mode}".{did_you_mean(mode, CONFIDENCE_MODES)}'
      " Set --config.loss.confidence"
    )
  confidence = ones if confidence is None else confidence.astype(jnp.float32)
  return (confidence, ones) if mode == "weight" else (ones, confidence)


def check_input(
  logits: jax.Array | ChunkedLogits,
  labels: jax.Array,
  label_lengths: jax.Array,
  blank_id: int,
  vocab_size: int | None,
  **per_example: jax.Array | None,
) -> int:
  """Returns the number of true classes.

  Raises:
    UserError: see `query_ctc_loss`.
  """
  shape = logits.shape
  if len(shape) != 3 or labels.ndim != 2 or shape[0] != len(labels):
    raise UserError(
      "the Query-CTC loss needs logits [B, N, V] and labels [B, L], got"
      f" {shape} and {labels.shape}"
    )
  if shape[1] < 1:
    raise UserError(
      f"logits {shape} have no query; set --config.model.num_queries to at"
      " least 1"
    )
  if isinstance(logits, ChunkedLogits):
    _check_chunked(logits)
  elif not jnp.issubdtype(logits.dtype, jnp.floating):
    raise UserError(f"logits must be floats, got {logits.dtype}")
  size = check_classes(shape[-1], vocab_size, blank_id)
  check_targets(labels, label_lengths, size, blank_id, **per_example)
  return size


def make_head(
  logits: jax.Array | ChunkedLogits, vocab_size: int, axes: MeshAxes
) -> tuple[Head, Any]:
  """Returns the head that computes the logits, and its inputs."""
  b, _, v = logits.shape
  if isinstance(logits, ChunkedLogits):
    split = split_of(axes, b, v, width=logits.table.shape[1])
    head = ChunkedHead(vocab_size, logits.chunk_size, split)
    return head, (jnp.asarray(logits.states), jnp.asarray(logits.table))
  return DenseHead(vocab_size, split_of(axes, b, v)), jnp.asarray(logits)


def _terms(
  logits: jax.Array | ChunkedLogits,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
  blank_id: int,
  vocab_size: int,
  axes: MeshAxes,
) -> tuple[jax.Array, jax.Array]:
  """Returns nll and mean log-probability [B], see `compact.ctc_terms`."""
  head, inputs = make_head(logits, vocab_size, axes)
  return ctc_terms(head, blank_id, inputs, labels, label_lengths, temper)


def _smooth(
  nll: jax.Array, mean_log_prob: jax.Array, label_smoothing: float
) -> jax.Array:
  if label_smoothing == 0.0:
    return nll
  return (1.0 - label_smoothing) * nll - label_smoothing * mean_log_prob


def _check_chunked(logits: ChunkedLogits) -> None:
  if logits.chunk_size < 1:
    raise UserError(
      f"chunk size {logits.chunk_size} is below 1; set"
      " --config.loss.chunk_size, for example to 4096"
    )
  states, table = logits.states.shape, logits.table.shape
  if len(table) != 2 or states[-1] != table[-1]:
    raise UserError(
      f"chunked logits need states [B, N, D] and a table [V, D], got {states}"
      f" and {table}"
    )
