"""Query-CTC: CTC over the N parallel queries of the decoder.

A decoder of N queries gives N distributions over the vocabulary and blank at
once; the loss is the likelihood of the target over all its alignments with
the queries. `compact.py` does the arithmetic.

Instead of logits, both functions take `ChunkedLogits`, that is decoder states
and vocabulary table, and then never compute [B, N, V] as a whole. With
`MeshAxes` the vocabulary may be split over the devices of a mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.query_ctc.axes import MeshAxes, split_of
from narvl_jax.query_ctc.chunked import ChunkedHead, ChunkedLogits
from narvl_jax.query_ctc.compact import Head, ctc_terms, feasible
from narvl_jax.query_ctc.dense import DenseHead

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

  An infeasible target (see `feasible`) has zero loss and zero gradient. With
  `label_smoothing` e the loss is `(1 - e) * nll - e * m`, m being the mean
  log-probability over all queries and classes; m also acts on infeasible
  targets. The loss is not divided by the target length; `query_ctc_objective`
  does that.

  Works under `jit`, `vmap` and sharding over the batch. Only first-order
  reverse-mode differentiation with respect to `logits` is defined; the
  gradient has the dtype of `logits`, all sums are fp32.

  Args:
    logits: [B, N, V], unnormalised, any float dtype; or `ChunkedLogits`.
    labels: [B, L] integers, right padded with any id; blank is not a label.
    label_lengths: [B] integers, 0 for an empty target.
    blank_id: id of the blank class.
    vocab_size: number of true classes; logits at and after it are padding of
      the table and take no part. None: all V classes are true.
    label_smoothing: in [0, 1).
    axes: mesh axes that split batch and classes.

  Returns:
    Loss per example, float32 [B].

  Raises:
    UserError: `blank_id`, `vocab_size`, `label_smoothing` or chunk size out of
      range, or classes that do not divide by their axis.

  Source: Graves et al. 2006, section 4; NARVL (arXiv 2403.02249).
  """
  size = _check(logits, labels, blank_id, vocab_size, label_smoothing)
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
  """Training objective of a batch and what to log about it.

  The nll of an example is divided by its target length (at least 1) and
  smoothed as in `query_ctc_loss`; the objective is the mean over the examples
  with `example_mask`. Infeasible targets have zero nll but stay in the
  divisor, and are counted. To weight micro-batches in gradient accumulation,
  multiply the gradient by `metrics["examples"]`, add up, and divide by the
  summed `examples`.

  `confidence` c of a target acts in one of two ways:

    weight: c multiplies the loss of the example.
    temper: c multiplies the log-probabilities before the alignments are
      summed, and they are not renormalised, as the official code does. The
      value is the official one; the gradient is that of the value, whereas
      PyTorch's CTC returns another one wherever c is not 1.

  No gradient flows into `confidence`.

  Args:
    logits: [B, N, V], unnormalised, any float dtype; or `ChunkedLogits`.
    labels: [B, L] integers, right padded with any id; blank is not a label.
    label_lengths: [B] integers, 0 for an empty target.
    blank_id: id of the blank class.
    vocab_size: number of true classes, None for all V.
    label_smoothing: in [0, 1).
    confidence: [B] in (0, 1], None for 1.
    confidence_mode: one of `CONFIDENCE_MODES`.
    example_mask: [B] bool, False for rows that only fill the batch; None for
      all True.
    axes: mesh axes that split batch and classes.

  Returns:
    The objective (float32 scalar) and a dict without gradient: the float32
    scalars `loss` (the same), `nll` (the mean over examples of the nll per
    label, without smoothing and, in mode "weight", without confidence),
    `infeasible_fraction` and `examples` (sum of the mask), and
    `nll_per_example`, float32 [B], the terms of `nll`.

  Raises:
    UserError: an argument out of range or an unknown `confidence_mode`.

  Source: the official criterion (value in mode "temper"); NARVL
  (arXiv 2403.02249).
  """
  size = _check(logits, labels, blank_id, vocab_size, label_smoothing)
  if confidence_mode not in CONFIDENCE_MODES:
    raise UserError(
      f'unknown confidence mode "{confidence_mode}".'
      f"{did_you_mean(confidence_mode, CONFIDENCE_MODES)}"
      " Set --config.loss.confidence"
    )
  ones = jnp.ones(logits.shape[:1], jnp.float32)
  confidence = ones if confidence is None else confidence.astype(jnp.float32)
  temper = confidence if confidence_mode == "temper" else ones
  weight = confidence if confidence_mode == "weight" else ones
  mask = ones if example_mask is None else example_mask.astype(jnp.float32)
  examples = jnp.sum(mask)

  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(mask * x) / jnp.maximum(examples, 1.0)

  nll, mean_log_prob = _terms(
    logits, labels, label_lengths, temper, blank_id, size, axes
  )
  nll = nll / jnp.maximum(label_lengths, 1)
  losses = _smooth(nll, mean_log_prob, label_smoothing)
  loss = mean(jax.lax.stop_gradient(weight) * losses)
  infeasible = ~feasible(labels, label_lengths, logits.shape[1])
  metrics = {
    "loss": loss,
    "nll": mean(nll),
    "infeasible_fraction": mean(infeasible.astype(jnp.float32)),
    "examples": examples,
    "nll_per_example": nll,
  }
  return loss, jax.lax.stop_gradient(metrics)


def make_head(
  logits: jax.Array | ChunkedLogits, vocab_size: int, axes: MeshAxes
) -> tuple[Head, Any]:
  """Returns the head for logits [B, N, V], and its inputs."""
  b, _, v = logits.shape
  if isinstance(logits, ChunkedLogits):
    split = split_of(axes, b, v, width=logits.table.shape[1])
    head = ChunkedHead(vocab_size, logits.chunk_size, split)
    return head, (logits.states, logits.table)
  return DenseHead(vocab_size, split_of(axes, b, v)), logits


def _terms(
  logits: jax.Array | ChunkedLogits,
  labels: jax.Array,
  label_lengths: jax.Array,
  temper: jax.Array,
  blank_id: int,
  vocab_size: int,
  axes: MeshAxes,
) -> tuple[jax.Array, jax.Array]:
  """Returns nll and mean log-probability [B]; see `compact.ctc_terms`."""
  head, inputs = make_head(logits, vocab_size, axes)
  return ctc_terms(head, blank_id, inputs, labels, label_lengths, temper)


def _smooth(
  nll: jax.Array, mean_log_prob: jax.Array, label_smoothing: float
) -> jax.Array:
  if label_smoothing == 0.0:
    return nll
  return (1.0 - label_smoothing) * nll - label_smoothing * mean_log_prob


def _check(
  logits: jax.Array | ChunkedLogits,
  labels: jax.Array,
  blank_id: int,
  vocab_size: int | None,
  label_smoothing: float,
) -> int:
  """Returns the number of true classes; rejects wrong shapes and numbers."""
  shape = logits.shape
  if len(shape) != 3 or labels.ndim != 2 or shape[0] != len(labels):
    raise UserError(
      "query_ctc_loss needs logits [B, N, V] and labels [B, L], got"
      f" {shape} and {labels.shape}"
    )
  if isinstance(logits, ChunkedLogits) and logits.chunk_size < 1:
    raise UserError(
      f"chunk size {logits.chunk_size} is below 1; set"
      " --config.loss.chunk_size, for example to 4096"
    )
  classes = shape[-1]
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
  return size
