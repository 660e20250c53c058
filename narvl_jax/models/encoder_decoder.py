"""What NARVL and its autoregressive counterpart share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.models.attention import normal_init
from narvl_jax.models.encoder import Encoder, EncoderOutput
from narvl_jax.models.sizes import ModelConfig


def project(states: jax.Array, table: jax.Array) -> jax.Array:
  """Projects decoder states to the vocabulary.

  With the whole table, padding included, this also works where its rows are
  split over devices: cutting padding off would move them.

  Args:
    states: [..., D], the dtype of the product.
    table: [V, D], the tied table `params["embed_tokens"]` or some of its rows.

  Returns:
    logits float32 [..., V].
  """
  return jnp.einsum(
    "...d,vd->...v",
    states,
    table.astype(states.dtype),
    preferred_element_type=jnp.float32,
  )


class EncoderDecoder(nn.Module):
  """An encoder of image and text, and a tied table; the decoder is to come.

  One table embeds the text and projects the decoder states to the
  vocabulary (arXiv 2403.02249, section 3).
  """

  config: ModelConfig

  def setup(self) -> None:
    """Makes the parameters that both models have under the same names."""
    cfg = self.config
    self.embed_tokens = self.param(
      "embed_tokens",
      normal_init("vocab", "embed"),
      (cfg.padded_vocab_size, cfg.width),
    )
    self.encoder = Encoder(cfg)

  def encode(
    self,
    image: jax.Array,
    text: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> EncoderOutput:
    """Encodes picture and text; arguments and errors as of `__call__`."""
    if image_mask is None:
      image_mask = jnp.ones(image.shape[0], bool)
    return self.encoder(image, text, self.embed_tokens, image_mask, train)

  def _outputs(
    self, encoded: EncoderOutput, states: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns logits and intermediates; see `__call__`."""
    # Padding rows are cut off, so no softmax ever sees them.
    return project(states, self.embed_tokens[: self.config.vocab_size]), {
      "image_features": encoded.image_features,
      "encoder_out": encoded.out,
      "encoder_mask": encoded.mask,
      "position_embeddings": encoded.positions,
      "decoder_out": states,
    }
