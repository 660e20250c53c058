"""Greedy decoding: one forward pass, arg-max per query, collapse on device."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.models import project
from narvl_jax.query_ctc import MeshAxes, collapse, query_ctc_loss
from narvl_jax.query_ctc.axes import split_of

# Finite, so that log-sum-exp and differences of logits never become NaN.
_NEVER = -1e9

_WHOLE = MeshAxes()

PredictStep = Callable[..., dict[str, jax.Array]]


def greedy_decode(
  logits: jax.Array,
  merge_repeats: jax.Array,
  *,
  blank_id: int,
  pad_id: int,
  forbidden: np.ndarray | None = None,
  vocab_size: int | None = None,
  axes: MeshAxes = _WHOLE,
) -> dict[str, jax.Array]:
  """Returns the greedy answer of every example and its probability.

  The probability is that of the answer under the rule by which it is read:
  where repeats are merged, the sum over all alignments that collapse to the
  answer (the Query-CTC likelihood); where they are not, every query must say
  exactly what it said, so it is the product of the arg-max probabilities.
  Both are taken after the forbidden classes have been removed.

  Over a split vocabulary only [B, N] and [B, N, L+1] numbers cross devices,
  and the answers are the same.

  Args:
    logits: [B, N, V] float32.
    merge_repeats: [B] bool, whether equal neighbours are one token.
    blank_id: id of the CTC blank.
    pad_id: id that fills the tail of `ids`; never part of an answer.
    forbidden: [vocab_size] bool, classes that must not be predicted.
    vocab_size: number of true classes, those after it are padding of the
      table; None for all V.
    axes: mesh axes that split batch and classes.

  Returns:
    ids [B, N] int32, lengths [B] int32, probability [B] float32.

  Raises:
    UserError: the classes do not divide by their mesh axis.
  """
  logits = logits.astype(jnp.float32)
  classes = logits.shape[-1]
  size = classes if vocab_size is None else vocab_size
  if forbidden is not None or size < classes:
    never = np.zeros(size, bool) if forbidden is None else forbidden
    never = np.pad(never, (0, classes - size), constant_values=True)
    logits = jnp.where(never, _NEVER, logits)
  token_ids, best_log_probs = _best_classes(logits, axes)
  ids, lengths = collapse(
    token_ids, blank_id=blank_id, pad_id=pad_id, merge_repeats=merge_repeats
  )
  path_log_prob = jnp.sum(best_log_probs, axis=-1)
  # The arg-max path collapses to the answer, so the loss is always finite.
  answer_log_prob = -query_ctc_loss(
    logits, ids, lengths, blank_id=blank_id, axes=axes
  )
  log_prob = jnp.where(merge_repeats, answer_log_prob, path_log_prob)
  return {
    "ids": ids,
    "lengths": lengths,
    # Rounding may push the sum over alignments past 1.
    "probability": jnp.minimum(jnp.exp(log_prob), 1.0),
  }


def _best_classes(
  logits: jax.Array, axes: MeshAxes
) -> tuple[jax.Array, jax.Array]:
  """Returns the arg-max int32 [B, N] and its log-probability [B, N].

  The smallest id wins a tie.
  """
  split = split_of(axes, logits.shape[0], logits.shape[-1])

  def local(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(logits, axis=-1)
    ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if split.vocab is not None:
      ids += split.first_class(logits.shape[-1])
      # [devices, B, N]; the first device has the smallest ids.
      ids, values = jax.lax.all_gather((ids, largest), split.vocab)
      winner = jnp.argmax(values, axis=0)[None]
      ids, largest = (
        jnp.take_along_axis(x, winner, axis=0)[0] for x in (ids, values)
      )
    mass = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    return ids, -jnp.log(split.sum_over_classes(mass))

  return split.run(
    local,
    logits,
    in_specs=(split.logits,),
    out_specs=(split.rows, split.rows),
  )


def make_predict_step(
  model: nn.Module,
  *,
  blank_id: int,
  pad_id: int,
  forbidden: np.ndarray | None = None,
  axes: MeshAxes = _WHOLE,
  rules: tuple[Any, ...] = (),
) -> PredictStep:
  """Returns the jitted predict step of a model.

  Equal arguments return the same function, so that nothing is compiled twice
  for one batch shape, whoever asks.

  Args:
    model: its `apply` returns (logits [B, N, V], aux), where aux holds the
      states "decoder_out" that `project` takes together with its parameter
      "embed_tokens".
    blank_id: id of the CTC blank.
    pad_id: padding of texts and answers.
    forbidden: [V] bool, classes that must not be predicted; None allows all,
      as the official checkpoints expect.
    axes: mesh axes that split batch and classes; they count if the step is
      called under `jax.set_mesh`.
    rules: for `flax.linen.logical_axis_rules`, which say how the activations
      are split; they count likewise.

  Returns:
    `step(variables, image, text, image_mask, merge_repeats)` with image
    [B, H, W, 3] uint8 or float32, text [B, T] int32, image_mask [B] bool and
    merge_repeats [B] bool; it returns what `greedy_decode` returns.
  """
  packed = None if forbidden is None else np.asarray(forbidden, bool).tobytes()
  return _predict_step(model, blank_id, pad_id, packed, axes, rules)


@functools.lru_cache(maxsize=16)
def _predict_step(
  model: nn.Module,
  blank_id: int,
  pad_id: int,
  packed: bytes | None,
  axes: MeshAxes,
  rules: tuple[Any, ...],
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
    with nn.logical_axis_rules(rules):
      outputs: Any = model.apply(
        variables, image, text, image_mask=image_mask, train=False
      )
    # Of these logits only the shape is used: cutting the padding off the table
    # would move its rows between devices.
    logits, aux = outputs
    return greedy_decode(
      project(aux["decoder_out"], variables["params"]["embed_tokens"]),
      merge_repeats,
      blank_id=blank_id,
      pad_id=pad_id,
      forbidden=forbidden,
      vocab_size=logits.shape[-1],
      axes=axes,
    )

  return step
