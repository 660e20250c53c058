"""Greedy decoding: one forward pass, arg-max per query, collapse on device."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.query_ctc import collapse, query_ctc_loss

# Finite, so that log-sum-exp and differences of logits never become NaN.
_NEVER = -1e9

PredictStep = Callable[..., dict[str, jax.Array]]


def greedy_decode(
  logits: jax.Array,
  merge_repeats: jax.Array,
  *,
  blank_id: int,
  pad_id: int,
  forbidden: np.ndarray | None = None,
) -> dict[str, jax.Array]:
  """Returns the greedy answer of every example and its probability.

  The probability is that of the answer under the rule by which it is read:
  where repeats are merged, the sum over all alignments that collapse to the
  answer (the Query-CTC likelihood); where they are not, every query must say
  exactly what it said, so it is the product of the arg-max probabilities.
  Both are taken after the forbidden classes have been removed.

  Args:
    logits: [B, N, V] float32.
    merge_repeats: [B] bool, whether equal neighbours are one token.
    blank_id: id of the CTC blank.
    pad_id: id that fills the tail of `ids`; never part of an answer.
    forbidden: [V] bool, classes that must not be predicted.

  Returns:
    ids [B, N] int32, lengths [B] int32, probability [B] float32.
  """
  logits = logits.astype(jnp.float32)
  if forbidden is not None:
    logits = jnp.where(jnp.asarray(forbidden), _NEVER, logits)
  token_ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  ids, lengths = collapse(
    token_ids, blank_id=blank_id, pad_id=pad_id, merge_repeats=merge_repeats
  )
  best_log_probs = jnp.max(jax.nn.log_softmax(logits), axis=-1)
  path_log_prob = jnp.sum(best_log_probs, axis=-1)
  # The arg-max path collapses to the answer, so the loss is always finite.
  answer_log_prob = -query_ctc_loss(logits, ids, lengths, blank_id=blank_id)
  log_prob = jnp.where(merge_repeats, answer_log_prob, path_log_prob)
  return {
    "ids": ids,
    "lengths": lengths,
    # Rounding may push the sum over alignments past 1.
    "probability": jnp.minimum(jnp.exp(log_prob), 1.0),
  }


def make_predict_step(
  model: nn.Module,
  *,
  blank_id: int,
  pad_id: int,
  forbidden: np.ndarray | None = None,
) -> PredictStep:
  """Returns the jitted predict step of a model.

  Equal arguments return the same function, so that nothing is compiled twice
  for one batch shape, whoever asks.

  Args:
    model: its `apply` returns (logits [B, N, V], aux).
    blank_id: id of the CTC blank.
    pad_id: padding of texts and answers.
    forbidden: [V] bool, classes that must not be predicted; None allows all,
      as the official checkpoints expect.

  Returns:
    `step(variables, image, text, image_mask, merge_repeats)` with image
    [B, H, W, 3] uint8 or float32, text [B, T] int32, image_mask [B] bool and
    merge_repeats [B] bool; it returns what `greedy_decode` returns.
  """
  packed = None if forbidden is None else np.asarray(forbidden, bool).tobytes()
  return _predict_step(model, blank_id, pad_id, packed)


@functools.lru_cache(maxsize=16)
def _predict_step(
  model: nn.Module, blank_id: int, pad_id: int, packed: bytes | None
) -> PredictStep:
  """Builds the step; the key is hashable, hence the packed mask."""
  forbidden = None if packed is None else np.frombuffer(packed, bool)

  @jax.jit
  def step(
    variables: Any,
    image: jax.Array,
    text: jax.Array,
    image_mask: jax.Array,
    merge_repeats: jax.Array,
  ) -> dict[str, jax.Array]:
    logits, _ = model.apply(
      variables, image, text, image_mask=image_mask, train=False
    )
    return greedy_decode(
      logits,
      merge_repeats,
      blank_id=blank_id,
      pad_id=pad_id,
      forbidden=forbidden,
    )

  return step
