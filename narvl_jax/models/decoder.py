"""The parallel decoder and its causal counterpart."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.kernels.attend import LOWEST
from narvl_jax.models import positions
from narvl_jax.models.attention import (
  PositionBias,
  layer_norm,
  normal_init,
)
from narvl_jax.models.encoder import EncoderOutput
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.models.transformer import (
  DecoderLayer,
  drop_path_rates,
  scan_layers,
)
from narvl_jax.parallel.constraints import constrain, gathered


class Decoder(nn.Module):
  """Base class: all of a decoder but its input."""

  config: ModelConfig

  def _run(
    self,
    x: jax.Array,
    encoded: EncoderOutput,
    train: bool,
    *,
    self_mask: jax.Array | None = None,
    causal: bool = False,
  ) -> jax.Array:
    """Runs the layers; call it in a method that is `nn.compact`.

    Args:
      x: input [B, N, D], before its LayerNorm.
      encoded: output of the encoder.
      train: enables dropout and stochastic depth.
      self_mask: bool [B, N], inputs that may be attended to; None for all.
      causal: whether an input attends only to itself and earlier ones.

    Returns:
      States [B, N, D] after the last LayerNorm.
    """
    cfg = self.config
    x = layer_norm(cfg, "layernorm_embedding")(x)
    x = constrain(x, "batch", None, "act_embed")
    x = nn.Dropout(cfg.dropout, deterministic=not train)(x)
    length = x.shape[1]
    table = self.param(
      "embed_positions",
      normal_init(None, "embed"),
      (cfg.max_text_positions, cfg.width),
    )
    table = gathered(table, cfg.dtype, None, "embed", scatter=False)
    pos = layer_norm(cfg, "pos_ln")(table[:length])
    self_bias = PositionBias(cfg, name="self_position_bias")(pos, pos)
    if causal:
      self_bias += causal_bias(length, self_bias.dtype)
    shared = {
      "self_bias": self_bias,
      "cross_bias": PositionBias(cfg, name="cross_position_bias")(
        pos, encoded.positions
      ),
      "memory": encoded.out,
      "memory_mask": encoded.mask,
      "self_mask": self_mask,
    }
    rows = positions.num_token_buckets(cfg.token_bucket_size)
    per_layer = {
      "token_table": self.param(
        "token_rel_pos_table",
        normal_init("layers", None, "heads"),
        (cfg.decoder_layers, rows, cfg.num_heads),
      ),
      "drop_path": drop_path_rates(cfg.decoder_drop_path, cfg.decoder_layers),
    }
    layers = scan_layers(
      DecoderLayer,
      cfg,
      depth=cfg.decoder_layers,
      train=train,
      name="layers",
    )
    x, _ = layers(x, per_layer, shared)
    return layer_norm(cfg, "layer_norm")(x)


def causal_bias(length: int, dtype: jnp.dtype) -> jax.Array:
  """Returns a bias [L, L]: very low where the key is after the query."""
  # Half of the lowest number, so that adding other biases does not overflow.
  future = jnp.triu(jnp.ones((length, length), bool), 1)
  return jnp.where(future, LOWEST / 2, 0.0).astype(dtype)


class CausalDecoder(Decoder):
  """Autoregressive decoder with teacher forcing.

  It differs from `QueryDecoder` in its input and in its causal self-attention.
  `models.cached_decoder` runs it token by token.
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
      encoded: output of the encoder.
      embedded: embeddings of the input tokens [B, L, D], without positions.
      mask: bool [B, L], False where the input is padding.
      train: enables dropout and stochastic depth.
    """
    return self._run(embedded, encoded, train, self_mask=mask, causal=True)


class QueryDecoder(Decoder):
  """Parallel decoder: learned queries attend to each other and the encoder.

  Self-attention has no mask, and the input does not depend on the target, so
  one pass gives the whole answer (arXiv 2403.02249, section 3).
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
