"""Teacher forcing of a batch whose tasks may have prompts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from narvl_jax.models.autoregressive import make_prompt, teacher_forcing


def forced_input(
  batch: Mapping[str, Any], prompted: tuple[bool, ...], pad_id: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the input of an autoregressive decoder under teacher forcing.

  Args:
    batch: see `training.train_step.batch_spec`.
    prompted: by task index, whether the decoder reads the source text first.
    pad_id: id of padding.

  Returns:
    The decoder input int32 [B, P + L - 1], and for each label the position
    whose output predicts it, int32 [B, L].
  """
  of_rows: jax.Array | bool = False
  if any(prompted):
    of_rows = jnp.asarray(prompted)[batch["task"]]
  prompt = make_prompt(batch["text"], of_rows, pad_id)
  return teacher_forcing(prompt, batch["labels"], batch["label_length"], pad_id)


def predicting_states(states: jax.Array, places: jax.Array) -> jax.Array:
  """Gathers [B, L, D] of the states [B, P + L - 1, D] at places [B, L]."""
  return jnp.take_along_axis(states, places[..., None], axis=1)
