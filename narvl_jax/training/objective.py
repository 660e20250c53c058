"""Objectives: the forward pass of a model and its loss.

An objective is called with (model, variables, batch, key, step) and returns
the loss, its metrics and the running statistics. The metrics contain "weight",
the number of labels or examples that the loss averages over, and
"nll_per_example" float32 [B].
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.decoding.constraint import START, Automaton, advance
from narvl_jax.decoding.constraint import allowed_tokens as allowed_at
from narvl_jax.models import project
from narvl_jax.query_ctc import (
  ChunkedLogits,
  MeshAxes,
  label_posterior,
  query_ctc_objective,
)
from narvl_jax.state.parameters import Params
from narvl_jax.training.cross_entropy import label_smoothed_cross_entropy
from narvl_jax.training.divergence import token_divergences
from narvl_jax.training.forcing import forced_input, predicting_states
from narvl_jax.training.teacher import Teacher

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
# See the docstring of the module.
Objective: TypeAlias = Callable[
  [nn.Module, Params, Batch, jax.Array, jax.Array],
  tuple[jax.Array, Metrics, Params],
]


@dataclasses.dataclass(frozen=True)
class QueryCtcLoss:
  """The Query-CTC loss of the parallel decoder.

  Attributes:
    blank_id: id of blank.
    vocab_size: number of classes.
    label_smoothing: in [0, 1).
    confidence_mode: "weight" or "temper".
    chunk_size: see `ChunkedLogits`; 0, or at least the vocabulary, for whole
      logits.
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
    """See the docstring of the module."""
    del step
    aux, batch_stats = _apply(model, variables, batch, key)
    states, table = aux["decoder_out"], variables["params"]["embed_tokens"]
    with jax.named_scope("loss_head"):
      loss, metrics = self.of_logits(self.logits(states, table), batch)
    return loss, metrics, batch_stats

  def logits(
    self, states: jax.Array, table: jax.Array
  ) -> jax.Array | ChunkedLogits:
    """Returns [B, N, V] from decoder states and the tied table."""
    # Uses the padded table: removing the padding would move rows between
    # devices. The logits of the model itself are unused, so XLA removes them.
    if 0 < self.chunk_size < len(table):
      return ChunkedLogits(states, table, self.chunk_size)
    return project(states, table)

  def of_logits(
    self, logits: jax.Array | ChunkedLogits, batch: Batch
  ) -> tuple[jax.Array, Metrics]:
    """Returns the loss and its metrics."""
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
    return loss, metrics


@dataclasses.dataclass(frozen=True)
class DistillationLoss:
  """The Query-CTC loss plus the divergence from a teacher at each label.

  With the weight w, gamma[n, l] the probability that query n emits label l
  (`label_posterior`), and D[n, l] the divergence of the query's distribution,
  without blank, from the teacher's at that label (`token_divergences`), the
  loss is

      (1 - w) query_ctc + w mean_b 1/L sum_l sum_n gamma[n, l] / G[l] D[n, l]

  with G[l] the sum of gamma over n. The mean runs over the examples; a target
  longer than the queries can express contributes nothing. No gradient flows
  through gamma. The metric "distillation" is the second term without w.

  Attributes:
    labels: the loss of the labels.
    teacher: the teacher.
    variables: its weights.
    weight: w, in [0, 1].
    temperature: see `token_divergences`.
  """

  labels: QueryCtcLoss
  teacher: Teacher
  variables: Params
  weight: float
  temperature: float = 1.0

  def __call__(
    self,
    model: nn.Module,
    variables: Params,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, Metrics, Params]:
    """See the docstring of the module."""
    del step
    aux, batch_stats = _apply(model, variables, batch, key)
    states, table = aux["decoder_out"], variables["params"]["embed_tokens"]
    with jax.named_scope("loss_head"):
      logits = self.labels.logits(states, table)
      loss, metrics = self.labels.of_logits(logits, batch)
    with jax.named_scope("distillation"):
      distillation = self._distillation(logits, states, table, batch)
    loss = (1.0 - self.weight) * loss + self.weight * distillation
    metrics |= jax.lax.stop_gradient(
      {"loss": loss, "distillation": distillation}
    )
    return loss, metrics, batch_stats

  def _distillation(
    self,
    logits: jax.Array | ChunkedLogits,
    states: jax.Array,
    table: jax.Array,
    batch: Batch,
  ) -> jax.Array:
    """Returns the second term of the loss, without the weight."""
    labels = self.labels
    posterior = label_posterior(
      logits,
      batch["labels"],
      batch["label_length"],
      blank_id=labels.blank_id,
      vocab_size=labels.vocab_size,
      axes=labels.axes,
    )
    # The sum is at least 1 for a label; otherwise it is 0.
    share = posterior / jnp.maximum(jnp.sum(posterior, axis=1), 1.0)[:, None]
    divergences = token_divergences(
      states,
      table,
      self.teacher.states(self.variables, batch),
      self.variables["params"]["embed_tokens"],
      blank_id=labels.blank_id,
      vocab_size=labels.vocab_size,
      temperature=self.temperature,
      chunk_size=labels.chunk_size,
    )
    total = jnp.sum(share * divergences, axis=(1, 2))
    mean = total / jnp.maximum(batch["label_length"], 1)
    valid = batch["valid"].astype(jnp.float32)
    return jnp.sum(valid * mean) / jnp.maximum(jnp.sum(valid), 1.0)


@dataclasses.dataclass(frozen=True)
class AutoregressiveLoss:
  """Teacher forcing and label-smoothed cross-entropy.

  Attributes:
    vocab_size: number of classes.
    pad_id: padding of texts and labels.
    eos_id: ends every target.
    prompted: by task index, whether the decoder reads the source text first.
    constraints: task index -> allowed answers, without eos. Examples with
      another answer do not count; "infeasible_fraction" is their share.
    label_smoothing: see `label_smoothed_cross_entropy`, as the next ones.
    drop_worst: share of the labels that is dropped.
    drop_worst_after: number of updates before labels are dropped.
    average: "labels" or "examples".
  """

  vocab_size: int
  pad_id: int
  eos_id: int
  prompted: tuple[bool, ...]
  constraints: Mapping[int, Automaton] = dataclasses.field(default_factory=dict)
  label_smoothing: float = 0.0
  drop_worst: float = 0.0
  drop_worst_after: int = 0
  average: str = "labels"

  def __call__(
    self,
    model: nn.Module,
    variables: Params,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, Metrics, Params]:
    """See the docstring of the module."""
    tokens, places = forced_input(batch, self.prompted, self.pad_id)
    aux, batch_stats = _apply(model, variables, batch, key, tokens)
    with jax.named_scope("loss_head"):
      # Only states that predict a label are projected to the vocabulary.
      states = predicting_states(aux["decoder_out"], places)
      table = variables["params"]["embed_tokens"]
      drop_worst = self.drop_worst
      if drop_worst:
        drop_worst = jnp.where(step >= self.drop_worst_after, drop_worst, 0.0)
      allowed = self._allowed(batch, len(table))
      outside = _outside(batch, allowed)
      loss, metrics = label_smoothed_cross_entropy(
        project(states, table),
        batch["labels"],
        batch["label_length"],
        vocab_size=self.vocab_size,
        label_smoothing=self.label_smoothing,
        confidence=batch["confidence"],
        example_mask=batch["valid"] & ~outside,
        allowed=allowed,
        drop_worst=drop_worst,
        average=self.average,
      )
      examples = jnp.sum(batch["valid"], dtype=jnp.float32)
      lost = jnp.sum(batch["valid"] & outside, dtype=jnp.float32)
      metrics["examples"] = examples
      metrics["infeasible_fraction"] = lost / jnp.maximum(examples, 1.0)
    return loss, metrics, batch_stats

  def _allowed(self, batch: Batch, classes: int) -> jax.Array | None:
    """Returns bool [B, L, V], the allowed classes at each label."""
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


def _outside(batch: Batch, allowed: jax.Array | None) -> jax.Array:
  """Returns bool [B], examples with a label that is not allowed."""
  labels, lengths = batch["labels"], batch["label_length"]
  if allowed is None:
    return jnp.zeros(len(labels), bool)
  # Not a lookup: where the classes are split over devices they stay there.
  here = labels[..., None] == jnp.arange(allowed.shape[-1])
  said = jnp.any(allowed & here, axis=-1)
  inside = jnp.arange(labels.shape[1]) < lengths[:, None]
  return jnp.any(inside & ~said, axis=1)


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
