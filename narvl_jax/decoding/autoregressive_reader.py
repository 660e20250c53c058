"""Decodes an autoregressive model, with a cache of keys and values."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.decoding.answers import AnswerSet, pad_answers
from narvl_jax.decoding.beam_search import beam_search
from narvl_jax.decoding.candidates import score_candidates
from narvl_jax.decoding.classes import Classes, masked, never_predicted
from narvl_jax.decoding.constraint import alphabet
from narvl_jax.decoding.settings import Decoding
from narvl_jax.decoding.steps import Decoded, Inputs
from narvl_jax.models import cached_decoder, project
from narvl_jax.models.autoregressive import Prompt, make_prompt


@dataclasses.dataclass(frozen=True)
class AutoregressiveReader:
  """Beam search (greedy search is a beam of 1), or scores of all candidates.

  The variables must be those that `prepare_variables` returns.

  Attributes:
    decoding: the way to decode; lengths are taken from the inputs instead.
    length_limit: room for the tokens of an answer, without eos.
    prompted: whether the prompt of the decoder is the source.
    answers: allowed answers, without eos; None for all.
    group_size: candidates that are scored at a time.
  """

  classes: Classes
  decoding: Decoding
  length_limit: int
  prompted: bool = False
  answers: AnswerSet | None = None
  group_size: int = 16

  def __call__(
    self, model: nn.Module, variables: Any, encoded: Any, inputs: Inputs
  ) -> Decoded:
    """See `steps.Reader`; also returns "steps", int32, decoder passes."""
    prompt = make_prompt(inputs.text, self.prompted, self.classes.pad_id)
    if self.decoding.method == "candidates":
      found = self._candidates(model, variables, encoded, prompt)
    else:
      found = self._search(model, variables, encoded, prompt, inputs.lengths)
    if inputs.target is not None:
      found["target_log_prob"] = self._target_log_prob(
        model, variables, encoded, prompt, *inputs.target
      )
    return found

  def _target_log_prob(
    self,
    model: Any,
    variables: Any,
    encoded: Any,
    prompt: Prompt,
    labels: jax.Array,
    lengths: jax.Array,
  ) -> jax.Array:
    """Returns the log-probabilities of labels with eos, by teacher forcing."""
    network = _Network(model.config, variables["params"], None)
    cache = network.start(encoded, prompt, 1, labels.shape[1] - 1)
    inputs = jnp.concatenate([_last(prompt)[:, None], labels[:, :-1]], axis=1)
    logits = network.extend(inputs[:, None], cache)[:, 0]
    never = never_predicted(
      logits.shape[-1], self.classes.mask(), self.classes.vocab_size
    )
    log_probs = jnp.take_along_axis(
      jax.nn.log_softmax(masked(logits, never)), labels[..., None], axis=-1
    )[..., 0]
    inside = jnp.arange(labels.shape[1]) < lengths[:, None]
    return jnp.sum(jnp.where(inside, log_probs, 0.0), axis=1)

  def _search(
    self,
    model: Any,
    variables: Any,
    encoded: Any,
    prompt: Prompt,
    lengths: jax.Array,
  ) -> Decoded:
    size = self.decoding.beam_size if self.decoding.method == "beam" else 1
    constraint = tokens = None
    if self.decoding.constrained and self.answers is not None:
      constraint = self.answers.automaton()
      # Logits of other tokens are not computed.
      tokens = alphabet(constraint, self.classes.eos_id)
    network = _Network(model.config, variables["params"], tokens)
    found = beam_search(
      network.step,
      cached_decoder.reorder,
      network.start(encoded, prompt, size, self.length_limit),
      _last(prompt),
      eos_id=self.classes.eos_id,
      pad_id=self.classes.pad_id,
      beam_size=size,
      length_limit=self.length_limit,
      num_best=min(self.decoding.num_best, size),
      min_length=lengths[0],
      max_length=lengths[1],
      no_repeat_ngram=self.decoding.no_repeat_ngram,
      normalize=self.decoding.normalize,
      constraint=constraint,
      vocab_size=self.classes.vocab_size,
      forbidden=self.classes.mask(),
      alphabet=tokens,
    )
    return {
      name: found[name]
      for name in ("ids", "lengths", "log_probs", "scores", "steps")
    }

  def _candidates(
    self, model: Any, variables: Any, encoded: Any, prompt: Prompt
  ) -> Decoded:
    """Ranks the answers of a closed set by their log-probability."""
    assert self.answers is not None
    ids, lengths = pad_answers(self.answers, self.classes.pad_id)
    constraint = self.answers.automaton()
    tokens = alphabet(constraint, self.classes.eos_id)
    network = _Network(model.config, variables["params"], tokens)
    group = min(self.group_size, len(ids))
    log_probs = score_candidates(
      network.extend,
      network.start(encoded, prompt, group, ids.shape[1] + 1),
      _last(prompt),
      ids,
      lengths,
      eos_id=self.classes.eos_id,
      constraint=constraint,
      alphabet=tokens,
      vocab_size=self.classes.vocab_size,
      forbidden=self.classes.mask(),
      group_size=group,
    )
    best = min(self.decoding.num_best, len(ids))
    values, places = jax.lax.top_k(log_probs, best)
    passes = -(-len(ids) // group)
    return {
      "ids": jnp.asarray(ids)[places],
      "lengths": jnp.asarray(lengths)[places],
      "log_probs": values,
      "scores": values,
      "steps": jnp.int32(passes),
    }


class _Network:
  """The cached decoder in the form that the searches call."""

  def __init__(
    self, config: Any, params: Any, tokens: np.ndarray | None
  ) -> None:
    """Computes logits of `tokens` only; None for all."""
    self._config = config
    self._params = params["decoder"]
    self._table = params["embed_tokens"]
    self._rows = self._table if tokens is None else self._table[tokens]

  def start(
    self, encoded: Any, prompt: Prompt, hypotheses: int, limit: int
  ) -> cached_decoder.Cache:
    return cached_decoder.start_cache(
      self._config,
      self._params,
      encoded,
      self._table,
      prompt,
      hypotheses=hypotheses,
      # The last token of the prompt is an input of the first step.
      length_limit=limit + 1,
    )

  def step(
    self, tokens: jax.Array, t: jax.Array, cache: cached_decoder.Cache
  ) -> tuple[jax.Array, cached_decoder.Cache]:
    logits, cache = self._run(tokens[..., None], t, cache)
    return logits[:, :, 0], cache

  def extend(self, tokens: jax.Array, cache: cached_decoder.Cache) -> jax.Array:
    return self._run(tokens, 0, cache)[0]

  def _run(
    self, tokens: jax.Array, t: Any, cache: cached_decoder.Cache
  ) -> tuple[jax.Array, cached_decoder.Cache]:
    states, cache = cached_decoder.extend(
      self._config, self._params, cache, self._table, tokens, t
    )
    return project(states, self._rows), cache


def _last(prompt: Prompt) -> jax.Array:
  """Returns the last token of every prompt, int32 [B]."""
  last = jnp.take_along_axis(prompt.ids, prompt.length[:, None] - 1, axis=1)
  return last[:, 0]
