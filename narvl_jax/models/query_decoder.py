"""Decoder that turns N learnable queries into N distributions in one pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.models.attention import normal_init
from narvl_jax.models.decoder import Decoder
from narvl_jax.models.encoder import EncoderOutput
from narvl_jax.parallel.constraints import gathered


class QueryDecoder(Decoder):
  """Parallel decoder: queries attend to each other and to the encoder.

  Self-attention has no mask and the input does not depend on the target, so
  the cost does not depend on the length of the answer (NARVL, section 3).
  """

  @nn.compact
  def __call__(self, encoded: EncoderOutput, train: bool) -> jax.Array:
    """Returns the decoder states [B, N, D] after the last LayerNorm."""
    cfg = self.config
    queries = self.param(
      "query_embed", normal_init(None, "embed"), (cfg.num_queries, cfg.width)
    )
    x = gathered(queries, cfg.dtype, None, "embed", scatter=False)
    x = jnp.broadcast_to(x, (encoded.out.shape[0], *x.shape))
    return self._run(x, encoded, train)
