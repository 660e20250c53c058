"""NARVL: an encoder and a parallel decoder of learned queries."""

from typing import Any

import jax

from narvl_jax.models.decoder import QueryDecoder
from narvl_jax.models.encoder import EncoderOutput
from narvl_jax.models.encoder_decoder import EncoderDecoder


class NARVL(EncoderDecoder):
  """Vision-language model that answers in one decoder pass."""

  decoder_class = QueryDecoder

  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Predicts a distribution over the vocabulary for every query.

    Args:
      image: [B, H, W, 3], float32 in [-1, 1], or uint8.
      text: int32 [B, T] source ids, right padded with `pad_id`.
      image_mask: bool [B], False where an example has no picture; None if
        all have one.
      train: enables dropout and stochastic depth (rng "dropout") and, with
        `batch_norm="batch"`, batch statistics (mutable "batch_stats").

    Returns:
      Logits float32 [B, N, V] and intermediates: "image_features"
      [B, h, w, C], "encoder_out" [B, S, D], "encoder_mask" bool [B, S],
      "position_embeddings" [S, D], "decoder_out" [B, N, D]. With the mutable
      collection "intermediates", `cross_attention` returns the weights of the
      decoder, too.

    Raises:
      UserError: picture or text exceeds the position tables.
    """
    encoded = self.encode(image, text, image_mask=image_mask, train=train)
    return self._outputs(encoded, self.decode(encoded, train=train))

  def decode(self, encoded: EncoderOutput, *, train: bool = False) -> jax.Array:
    """Returns the decoder states [B, N, D], the input of `project`."""
    return self.decoder(encoded, train)


def cross_attention(collected: Any) -> jax.Array:
  """Returns the weights of cross-attention, float32 [layers, B, H, N, S].

  Args:
    collected: the collection "intermediates" of a call of the model.
  """
  (weights,) = collected["decoder"]["layers"]["cross_attention"]
  return weights
