"""From a batch to the loss: the forward pass of each model and its criterion.

An objective is called with (model, variables, batch, key, step) and returns
the loss, its metrics and the running statistics. The metrics hold "weight",
what the loss averages over, and "nll_per_example" float32 [B].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.decoding.constraint import START, Automaton, advance
from narvl_jax.decoding.constraint import allowed_tokens as allowed_at
from narvl_jax.models import project
from narvl_jax.models.autoregressive import make_prompt, teacher_forcing
from narvl_jax.query_ctc import ChunkedLogits, MeshAxes, query_ctc_objective
from narvl_jax.training.cross_entropy import label_smoothed_cross_entropy
from narvl_jax.training.optimizer import Params

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class QueryCtcLoss:
  """The Query-CTC loss of the parallel decoder.

  Attributes:
    blank_id: id of blank.
    vocab_size: number of classes.
    label_smoothing: in [0, 1).
    confidence_mode: "weight" or "temper".
    chunk_size: classes whose logits exist at a time, at the price of computing
      them twice; 0, or a vocabulary that fits, for all and once.
    axes: mesh axes that split the batch and the vocabulary.
  """

  blank_id: int
  vocab_size: int
  label_smoothing: float = 0.0
  confidence_mode: str = "weight"
  chunk_size: int = 0
  axes: MeshAxes = dataclasses.field(default_factory=MeshAxes)

  def __call__(
    self,
    model: nn.Module,
    variables: Params,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, Metrics, Params]:
    """See the module."""
    del step
    aux, batch_stats = _apply(model, variables, batch, key)
    # From the padded table: cutting off the padding would move its rows
    # between devices. Nobody reads the logits of the model, so XLA leaves them
    # out.
    states, table = aux["decoder_out"], variables["params"]["embed_tokens"]
    if 0 < self.chunk_size < len(table):
      logits = ChunkedLogits(states, table, self.chunk_size)
    else:
      logits = project(states, table)
    loss, metrics = query_ctc_objective(
      logits,
      batch["labels"],
      batch["label_length"],
      blank_id=self.blank_id,
      vocab_size=self.vocab_size,
      label_smoothing=self.label_smoothing,
      confidence=batch["confidence"],
      confidence_mode=self.confidence_mode,
      example_mask=batch["valid"],
      axes=self.axes,
    )
    metrics["weight"] = metrics["examples"]
    return loss, metrics, batch_stats


@dataclasses.dataclass(frozen=True)
class AutoregressiveLoss:
  """Teacher forcing and label-smoothed cross-entropy.

  Attributes:
    vocab_size: number of classes.
    pad_id: padding of texts and labels.
    eos_id: ends every target.
    prompted: by the task index of a batch, whether the decoder reads the
      source before the answer.
    constraints: task index -> answers that it allows, without eos.
    label_smoothing: in [0, 1).
    drop_worst: share of the labels that is left out, see
      `label_smoothed_cross_entropy`.
    drop_worst_after: number of updates without that.
  """

  vocab_size: int
  pad_id: int
  eos_id: int
  prompted: tuple[bool, ...]
  constraints: Mapping[int, Automaton] = dataclasses.field(default_factory=dict)
  label_smoothing: float = 0.0
  drop_worst: float = 0.0
  drop_worst_after: int = 0

  def __call__(
    self,
    model: nn.Module,
    variables: Params,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, Metrics, Params]:
    """See the module."""
    prompted = False
    if any(self.prompted):
      prompted = jnp.asarray(self.prompted)[batch["task"]]
    prompt = make_prompt(batch["text"], prompted, self.pad_id)
    decoder_input, places = teacher_forcing(
      prompt, batch["labels"], batch["label_length"], self.pad_id
    )
    aux, batch_stats = _apply(model, variables, batch, key, decoder_input)
    # Only what predicts a label is projected to the vocabulary.
    states = jnp.take_along_axis(aux["decoder_out"], places[..., None], axis=1)
    table = variables["params"]["embed_tokens"]
    drop_worst = self.drop_worst
    if drop_worst:
      drop_worst = jnp.where(step >= self.drop_worst_after, drop_worst, 0.0)
    loss, metrics = label_smoothed_cross_entropy(
      project(states, table),
      batch["labels"],
      batch["label_length"],
      vocab_size=self.vocab_size,
      label_smoothing=self.label_smoothing,
      confidence=batch["confidence"],
      example_mask=batch["valid"],
      allowed=self._allowed(batch, len(table)),
      drop_worst=drop_worst,
    )
    return loss, metrics, batch_stats

  def _allowed(self, batch: Batch, classes: int) -> jax.Array | None:
    """Returns bool [B, L, V], what may be said at each label."""
    if not self.constraints:
      return None
    labels = batch["labels"]
    allowed = jnp.ones((*labels.shape, classes), bool)
    for index, automaton in self.constraints.items():

      def walk(
        state: jax.Array, token: jax.Array, automaton: Automaton = automaton
      ) -> tuple[jax.Array, jax.Array]:
        return advance(automaton, state, token), state

      start = jnp.full(len(labels), START, jnp.int32)
      _, states = jax.lax.scan(walk, start, labels.T)
      here = allowed_at(automaton, states.T, classes, self.eos_id)
      mine = (batch["task"] == index)[:, None, None]
      allowed &= ~mine | here
    return allowed


def _apply(
  model: nn.Module,
  variables: Params,
  batch: Batch,
  key: jax.Array,
  *decoder_input: jax.Array,
) -> tuple[dict[str, Any], Params]:
  """Returns the intermediates of a training pass, and the statistics."""
  outputs: Any = model.apply(
    variables,
    batch["image"],
    batch["text"],
    *decoder_input,
    image_mask=batch["image_mask"],
    train=True,
    rngs={"dropout": key},
    mutable=["batch_stats"],
  )
  (_, aux), updated = outputs
  return aux, updated.get("batch_stats", {})
