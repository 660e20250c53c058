"""Base class of NARVL and its autoregressive counterpart."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.models.attention import normal_init
from narvl_jax.models.encoder import Encoder, EncoderOutput
from narvl_jax.models.sizes import ModelConfig


def project(states: jax.Array, table: jax.Array) -> jax.Array:
  """Projects decoder states to the vocabulary.

  Where the rows of the table are split over devices, pass the whole table,
  padding included: cutting the padding off would move rows between devices.

  Args:
    states: [..., D]; the product has their dtype.
    table: [V, D], the tied table `params["embed_tokens"]` or some of its rows.

  Returns:
    Logits float32 [..., V].
  """
  return jnp.einsum(
    "...d,vd->...v",
    states,
    table.astype(states.dtype),
    preferred_element_type=jnp.float32,
  )


class EncoderDecoder(nn.Module):
  """An encoder of image and text, a decoder, and one tied table.

  The table embeds the text and projects the decoder states to the vocabulary
  (arXiv 2403.02249, section 3).

  Attributes:
    decoder_class: module of the decoder; takes the config.
  """

  config: ModelConfig
  decoder_class: ClassVar[type[nn.Module]]

  def setup(self) -> None:
    """Creates table, encoder and decoder."""
    cfg = self.config
    self.embed_tokens = self.param(
      "embed_tokens",
      normal_init("vocab", "embed"),
      (cfg.padded_vocab_size, cfg.width),
    )
    self.encoder = Encoder(cfg)
    self.decoder = self.decoder_class(cfg)

  def encode(
    self,
    image: jax.Array,
    text: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> EncoderOutput:
    """Encodes picture and text; arguments and errors as in `__call__`."""
    if image_mask is None:
      image_mask = jnp.ones(image.shape[0], bool)
    return self.encoder(image, text, self.embed_tokens, image_mask, train)

  def _outputs(
    self, encoded: EncoderOutput, states: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns logits and intermediates; see `__call__`."""
    # Without the padding rows of the table.
    return project(states, self.embed_tokens[: self.config.vocab_size]), {
      "image_features": encoded.image_features,
      "encoder_out": encoded.out,
      "encoder_mask": encoded.mask,
      "position_embeddings": encoded.positions,
      "decoder_out": states,
    }
