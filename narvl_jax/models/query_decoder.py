"""Decoder that turns N learnable queries into N distributions in one pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp

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


class QueryDecoder(nn.Module):
  """Parallel decoder: queries attend to each other and to the encoder.

  Self-attention has no mask and the input does not depend on the target, so
  the cost does not depend on the length of the answer (NARVL, section 3).
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, encoded: EncoderOutput, train: bool) -> jax.Array:
    """Returns the decoder states [B, N, D] after the last LayerNorm."""
    cfg = self.config
    n = cfg.num_queries
    batch = encoded.out.shape[0]
    queries = self.param(
      "query_embed", normal_init(None, "embed"), (n, cfg.width)
    )
    x = gathered(queries, cfg.dtype, None, "embed", scatter=False)
    x = layer_norm(cfg, "layernorm_embedding")(x)
    x = jnp.broadcast_to(x, (batch, n, cfg.width))
    x = constrain(x, "batch", None, "act_embed")
    x = nn.Dropout(cfg.dropout, deterministic=not train)(x)
    table = self.param(
      "embed_positions",
      normal_init(None, "embed"),
      (cfg.max_text_positions, cfg.width),
    )
    table = gathered(table, cfg.dtype, None, "embed", scatter=False)
    pos = layer_norm(cfg, "pos_ln")(table[:n])
    shared = {
      "self_bias": PositionBias(cfg, name="self_position_bias")(pos, pos),
      "cross_bias": PositionBias(cfg, name="cross_position_bias")(
        pos, encoded.positions
      ),
      "memory": encoded.out,
      "memory_mask": encoded.mask,
      "self_mask": None,
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
