"""Decoder that predicts each token from those before it (OFA)."""

import flax.linen as nn
import jax

from narvl_jax.models.decoder import Decoder
from narvl_jax.models.encoder import EncoderOutput


class CausalDecoder(Decoder):
  """Autoregressive decoder with teacher forcing.

  Differs from `QueryDecoder` in its input and in that self-attention sees no
  later position. `models.cached_decoder` runs it token by token.
  """

  @nn.compact
  def __call__(
    self,
    encoded: EncoderOutput,
    embedded: jax.Array,
    mask: jax.Array,
    train: bool,
  ) -> jax.Array:
    """Returns the decoder states [B, L, D] after the last LayerNorm.

    Args:
      encoded: what is attended to.
      embedded: input tokens [B, L, D], without positions.
      mask: bool [B, L], False where the input is padding.
      train: dropout and stochastic depth are on.
    """
    return self._run(embedded, encoded, train, self_mask=mask, causal=True)
