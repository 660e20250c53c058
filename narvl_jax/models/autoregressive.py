"""The autoregressive counterpart of NARVL: OFA (arXiv 2202.03052).

Encoder, decoder layers and tables are those of NARVL.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from narvl_jax.errors import UserError
from narvl_jax.models.decoder import CausalDecoder
from narvl_jax.models.encoder import EncoderOutput
from narvl_jax.models.encoder_decoder import EncoderDecoder
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.parallel.constraints import look_up

BOS_ID = 0


class Autoregressive(EncoderDecoder):
  """Vision-language model that answers token by token."""

  decoder_class = CausalDecoder

  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    decoder_input: jax.Array | None = None,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Predicts the token after each input token.

    Args:
      image: [B, H, W, 3], float32 in [-1, 1], or uint8.
      text: int32 [B, T] source ids, right padded with `pad_id`.
      decoder_input: int32 [B, L], bos and the target without its last token
        (`teacher_forcing`), right padded with `pad_id`; None for bos only.
      image_mask: bool [B], False where an example has no picture; None if
        all have one.
      train: see `NARVL`.

    Returns:
      Logits float32 [B, L, V] and the intermediates of `NARVL`, with L for N.

    Raises:
      UserError: picture, text or decoder input exceeds the position tables.
    """
    if decoder_input is None:
      decoder_input = jnp.full((image.shape[0], 1), BOS_ID, jnp.int32)
    encoded = self.encode(image, text, image_mask=image_mask, train=train)
    states = self.decode(encoded, decoder_input, train=train)
    return self._outputs(encoded, states)

  def decode(
    self,
    encoded: EncoderOutput,
    decoder_input: jax.Array,
    *,
    train: bool = False,
  ) -> jax.Array:
    """Returns the decoder states [B, L, D], the input of `project`."""
    cfg = self.config
    check_decoder_length(cfg, decoder_input.shape[1])
    embedded = look_up(
      self.embed_tokens, decoder_input, cfg.dtype, "vocab", "embed"
    )
    mask = decoder_input != cfg.pad_id
    return self.decoder(encoded, embedded, mask, train)


def check_decoder_length(config: ModelConfig, length: int) -> None:
  """Raises UserError if the position table has fewer rows than `length`."""
  if length > config.max_text_positions:
    raise UserError(
      f"a decoder input of {length} tokens (prompt and answer) exceeds"
      f" model.max_text_positions={config.max_text_positions}"
      f" (--config.model.max_text_positions={length}, or less with"
      " --config.data.max_text_length or --config.data.max_label_length)"
    )


class Prompt(NamedTuple):
  """Decoder input before the answer.

  Attributes:
    ids: int32 [B, P], right padded.
    length: int32 [B], at least 1: bos.
  """

  ids: jax.Array
  length: jax.Array


def make_prompt(
  text: jax.Array, prompted: jax.Array | bool, pad_id: int
) -> Prompt:
  """Returns the prompt: bos, or the source without its final eos.

  Args:
    text: int32 [B, T] source ids bos ... eos, right padded with `pad_id`.
    prompted: bool [B], whether the prompt is the source; the Python value
      False for bos alone everywhere, with P = 1.
    pad_id: id of padding.
  """
  if prompted is False:
    return Prompt(text[:, :1], jnp.ones(len(text), jnp.int32))
  length = jnp.sum(text != pad_id, axis=1, dtype=jnp.int32) - 1
  length = jnp.where(prompted, jnp.maximum(length, 1), 1)
  ids = text[:, :-1]
  inside = jnp.arange(ids.shape[1]) < length[:, None]
  return Prompt(jnp.where(inside, ids, pad_id), length)


def teacher_forcing(
  prompt: Prompt, labels: jax.Array, label_lengths: jax.Array, pad_id: int
) -> tuple[jax.Array, jax.Array]:
  """Joins prompt and target to the decoder input of training.

  Args:
    prompt: precedes the target.
    labels: int32 [B, L], right padded.
    label_lengths: int32 [B].
    pad_id: id of padding.

  Returns:
    The decoder input int32 [B, P + L - 1], and the position whose output
    predicts each label, int32 [B, L].
  """
  size = prompt.ids.shape[1] + labels.shape[1] - 1
  start = prompt.length[:, None]
  place = jnp.arange(size)[None]
  label = jnp.clip(place - start, 0, labels.shape[1] - 1)
  tokens = jnp.where(
    place < start,
    jnp.pad(prompt.ids, ((0, 0), (0, labels.shape[1] - 1))),
    jnp.take_along_axis(labels, label, axis=1),
  )
  # The last label is predicted, but never an input.
  inside = place < start + label_lengths[:, None] - 1
  tokens = jnp.where(inside, tokens, pad_id)
  return tokens, start - 1 + jnp.arange(labels.shape[1])
