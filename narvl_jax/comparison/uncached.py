"""Greedy search without a cache, to measure the gain from the cache."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.decoding import Classes, Inputs
from narvl_jax.decoding.beam_search import beam_search
from narvl_jax.decoding.steps import Decoded
from narvl_jax.models import project
from narvl_jax.models.autoregressive import make_prompt


@dataclasses.dataclass(frozen=True)
class UncachedReader:
  """Runs the decoder over the whole padded answer for every token.

  The variables are not prepared. Its answers equal those of the cached greedy
  search. Only the last state is projected to the vocabulary.

  Attributes:
    classes: ids with a meaning.
    length_limit: room for the tokens of an answer, without eos.
    prompted: whether the decoder reads the source first.
  """

  classes: Classes
  length_limit: int
  prompted: bool = False

  def __call__(
    self, model: nn.Module, variables: Any, encoded: Any, inputs: Inputs
  ) -> Decoded:
    """See `decoding.steps.Reader`; also "steps", the decoder passes, int32."""
    prompt = make_prompt(inputs.text, self.prompted, self.classes.pad_id)
    batch = len(prompt.ids)
    rows = jnp.arange(batch)
    said = jnp.pad(
      prompt.ids,
      ((0, 0), (0, self.length_limit)),
      constant_values=self.classes.pad_id,
    )
    last = prompt.length - 1

    def step(
      tokens: jax.Array, t: jax.Array, said: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
      said = said.at[rows, last + t].set(tokens[:, 0])
      states: Any = model.apply(variables, encoded, said, method="decode")
      logits = project(
        states[rows, last + t], variables["params"]["embed_tokens"]
      )
      return logits[:, None], said

    found = beam_search(
      step,
      lambda said, parents: said,
      said,
      prompt.ids[rows, last],
      eos_id=self.classes.eos_id,
      pad_id=self.classes.pad_id,
      beam_size=1,
      length_limit=self.length_limit,
      min_length=inputs.lengths[0],
      max_length=inputs.lengths[1],
      vocab_size=self.classes.vocab_size,
      forbidden=self.classes.mask(),
    )
    names = ("ids", "lengths", "log_probs", "steps")
    return {name: found[name] for name in names}
