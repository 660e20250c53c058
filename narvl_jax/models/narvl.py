"""NARVL: shared encoder, parallel query decoder, tied output table."""

from typing import Any

import jax

from narvl_jax.models.decoder import QueryDecoder
from narvl_jax.models.encoder import EncoderOutput
from narvl_jax.models.encoder_decoder import EncoderDecoder


class NARVL(EncoderDecoder):
  """Vision-language model that answers in one decoder pass."""

  def setup(self) -> None:
    """Adds the decoder."""
    super().setup()
    self.decoder = QueryDecoder(self.config)

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
    encoded = self.encode(image, text, image_mask=image_mask, train=train)
    return self._outputs(encoded, self.decode(encoded, train=train))

  def decode(self, encoded: EncoderOutput, *, train: bool = False) -> jax.Array:
    """Returns the decoder states [B, N, D], which `project` takes."""
    return self.decoder(encoded, train)
