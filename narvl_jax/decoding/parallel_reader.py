"""Decodes a parallel model, in one pass of its decoder."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.decoding import ctc
from narvl_jax.decoding.answers import AnswerSet, pad_answers
from narvl_jax.decoding.classes import Classes, masked, never_predicted
from narvl_jax.decoding.constraint import Automaton
from narvl_jax.decoding.greedy import greedy_decode
from narvl_jax.decoding.likelihood import (
  answer_log_prob,
  coordinate_distributions,
  query_entropy,
)
from narvl_jax.decoding.settings import Decoding
from narvl_jax.decoding.steps import Decoded, Inputs
from narvl_jax.errors import UserError
from narvl_jax.models import project, split_decoder
from narvl_jax.query_ctc import MeshAxes


@dataclasses.dataclass(frozen=True)
class ParallelReader:
  """Greedy decoding, prefix beam search, or scores of all candidates.

  Attributes:
    answers: allowed answers, with eos if targets have it; None for all.
    axes: mesh axes that split batch and classes under `jax.set_mesh`. Only
      unconstrained greedy decoding uses them; the others gather the logits.
  """

  classes: Classes
  decoding: Decoding = dataclasses.field(default_factory=Decoding)
  answers: AnswerSet | None = None
  axes: MeshAxes = dataclasses.field(default_factory=MeshAxes)

  def __call__(
    self, model: nn.Module, variables: Any, encoded: Any, inputs: Inputs
  ) -> Decoded:
    """See `steps.Reader`; `_details` lists what else is returned."""
    logits = project(
      _states(model, variables, encoded), variables["params"]["embed_tokens"]
    )
    found = self._answers(logits, inputs)
    return {**found, **self._details(logits, found, inputs)}

  def _answers(self, logits: jax.Array, inputs: Inputs) -> Decoded:
    if self.decoding.method == "candidates":
      return self._candidates(logits, inputs)
    if self.decoding.method == "beam":
      return ctc.prefix_beam(
        logits,
        beam_size=self.decoding.beam_size,
        num_best=self.decoding.num_best,
        merge_repeats=inputs.merge_repeats,
        constraint=self._constraint(),
        **self._ids(),
      )
    return self._greedy(logits, inputs)

  def _greedy(self, logits: jax.Array, inputs: Inputs) -> Decoded:
    constraint = self._constraint()
    if constraint is None:
      best = greedy_decode(
        logits, inputs.merge_repeats, axes=self.axes, **self._ids()
      )
    else:
      best = ctc.constrained_greedy(
        logits, constraint, merge_repeats=inputs.merge_repeats, **self._ids()
      )
    return {
      "ids": best["ids"][:, None],
      "lengths": best["lengths"][:, None],
      "log_probs": best["log_prob"][:, None],
    }

  def _candidates(self, logits: jax.Array, inputs: Inputs) -> Decoded:
    """Ranks the answers of a closed set."""
    assert self.answers is not None
    ids, lengths = pad_answers(self.answers, self.classes.pad_id)
    options = self._ids()
    del options["pad_id"]
    _, log_probs = ctc.best_candidate(
      logits, ids, lengths, merge_repeats=inputs.merge_repeats, **options
    )
    best = min(self.decoding.num_best, len(ids))
    values, places = jax.lax.top_k(log_probs, best)
    return {
      "ids": jnp.asarray(ids)[places],
      "lengths": jnp.asarray(lengths)[places],
      "log_probs": values,
    }

  def _details(
    self, logits: jax.Array, found: Decoded, inputs: Inputs
  ) -> Decoded:
    """Returns the distributions behind the answers, see `likelihood`.

    They are query_entropy float32 [B, N] and, if there are bins, of the best
    answer coordinate_bins int32 [B, 4, K] and coordinate_probs [B, 4, K].
    """
    forbidden, size = self.classes.mask(), self.classes.vocab_size
    logits = masked(logits, never_predicted(logits.shape[-1], forbidden, size))
    details = {"query_entropy": query_entropy(logits, self.axes)}
    blank_id, bins = self.classes.blank_id, self.classes.bins
    if inputs.target is not None and blank_id is not None:
      details["target_log_prob"] = answer_log_prob(
        logits,
        *inputs.target,
        inputs.merge_repeats,
        blank_id=blank_id,
        axes=self.axes,
      )
    if bins is None or blank_id is None:
      return details
    details["coordinate_bins"], details["coordinate_probs"] = (
      coordinate_distributions(
        logits,
        found["ids"][:, 0],
        found["lengths"][:, 0],
        inputs.merge_repeats,
        blank_id=blank_id,
        bins=bins,
        axes=self.axes,
      )
    )
    return details

  def _constraint(self) -> Automaton | None:
    if not self.decoding.constrained or self.answers is None:
      return None
    return self.answers.automaton()

  def _ids(self) -> dict[str, Any]:
    return {
      "blank_id": self.classes.blank_id,
      "pad_id": self.classes.pad_id,
      "forbidden": self.classes.mask(),
      "vocab_size": self.classes.vocab_size,
    }


def _states(model: Any, variables: Any, encoded: Any) -> jax.Array:
  """Returns the decoder states [B, N, D]."""
  decoder = variables["params"].get("decoder", {})
  if isinstance(decoder.get("layers"), tuple):
    return split_decoder.decode(model.config, decoder, encoded)
  return model.apply(variables, encoded, method="decode")


def check_queries(
  answers: AnswerSet, num_queries: int, *, merge_repeats: bool
) -> None:
  """Checks that the queries suffice for some allowed answer.

  Raises:
    UserError: they do not.
  """
  try:
    ctc.check_constraint(
      answers.automaton(), num_queries, merge_repeats=merge_repeats
    )
  except UserError as error:
    raise UserError(f"{answers.name}: {error}") from error
