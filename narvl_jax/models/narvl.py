"""NARVL: shared encoder, parallel query decoder, tied output table."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.models.attention import normal_init
from narvl_jax.models.encoder import Encoder
from narvl_jax.models.query_decoder import QueryDecoder
from narvl_jax.models.sizes import ModelConfig


def project(states: jax.Array, table: jax.Array) -> jax.Array:
  """Projects decoder states to the vocabulary.

  With the whole table, padding included, this also works where its rows are
  split over devices: cutting padding off would move them.

  Args:
    states: [B, N, D], the dtype of the product.
    table: [V, D], the tied table `params["embed_tokens"]` or some of its rows.

  Returns:
    logits float32 [B, N, V].
  """
  return jnp.einsum(
    "bnd,vd->bnv",
    states,
    table.astype(states.dtype),
    preferred_element_type=jnp.float32,
  )


class NARVL(nn.Module):
  """Vision-language model that answers in one decoder pass.

  One table embeds the text and projects the decoder states to the
  vocabulary (arXiv 2403.02249, section 3).
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Predicts a distribution per query.

    Args:
      image: [B, H, W, 3], float32 in [-1, 1], or uint8.
      text: int32 [B, T] source ids, right padded with `pad_id`.
      image_mask: bool [B], False where a sample has no picture; None: all
        have one.
      train: turns on dropout and stochastic depth (rng "dropout") and, with
        `batch_norm="batch"`, statistics of the batch (mutable
        "batch_stats").

    Returns:
      logits float32 [B, N, V] and intermediates: "image_features"
      [B, h, w, C], "encoder_out" [B, S, D], "encoder_mask" bool [B, S],
      "position_embeddings" [S, D], "decoder_out" [B, N, D].

    Raises:
      UserError: the picture or the text exceeds the position tables.
    """
    cfg = self.config
    table = self.param(
      "embed_tokens",
      normal_init("vocab", "embed"),
      (cfg.padded_vocab_size, cfg.width),
    )
    if image_mask is None:
      image_mask = jnp.ones(image.shape[0], bool)
    encoded = Encoder(cfg, name="encoder")(
      image, text, table, image_mask, train
    )
    states = QueryDecoder(cfg, name="decoder")(encoded, train)
    # Padding rows are cut off, so no softmax ever sees them.
    return project(states, table[: cfg.vocab_size]), {
      "image_features": encoded.image_features,
      "encoder_out": encoded.out,
      "encoder_mask": encoded.mask,
      "position_embeddings": encoded.positions,
      "decoder_out": states,
    }
