"""The parallel decoder for inference, faster if there are few queries.

It computes the same function as `QueryDecoder` with the products of
cross-attention in a cheaper order. Keys and values of the s encoder outputs
are never computed. Instead, the map of the keys is applied to the queries, and
the map of the values to the weighted means of the outputs. That takes
2 n h s e multiplications a layer instead of 2 s e^2 + 2 n s e, which is fewer
if there are fewer queries than a head is wide. Each layer has its own
parameters, so that no scan copies slices of stacked ones.

Letters: b batch, n queries, s source tokens, h heads, d head width, e model
width.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.kernels.attend import LOWEST, KeyValue, attend_to
from narvl_jax.models.attention import (
  LayerNorm,
  PositionBias,
  Projection,
  attention_scale,
)
from narvl_jax.models.encoder import EncoderOutput
from narvl_jax.models.relative_bias import token_bias
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.models.transformer import decoder_layer

Params = Mapping[str, Any]
_KEY, _VALUE, _VALUE_BIAS = "key_map", "value_map", "value_bias"


def pays(config: ModelConfig) -> bool:
  """Returns whether this order of products is cheaper than the usual one."""
  return config.num_queries < config.head_width


def split_parameters(config: ModelConfig, params: Params) -> Params:
  """Returns the parameters in the form that `decode` takes.

  Args:
    config: the architecture.
    params: parameters of `QueryDecoder`, unboxed.
  """

  def layer(i: int) -> Params:
    weights = jax.tree.map(lambda x: x[i], dict(params["layers"]))
    attention = dict(weights["encoder_attn"])
    maps = attention.pop("kv")
    kernel = maps["kernel"]
    return {
      "layer": {**weights, "encoder_attn": attention},
      _KEY: kernel[:, 0].transpose(1, 2, 0),
      _VALUE: kernel[:, 1].transpose(1, 0, 2),
      _VALUE_BIAS: maps["bias"][1],
    }

  layers = tuple(layer(i) for i in range(config.decoder_layers))
  return {**params, "layers": layers}


def decode(
  config: ModelConfig, params: Params, encoded: EncoderOutput
) -> jax.Array:
  """Returns the decoder states [b, n, e] after the last LayerNorm.

  Args:
    config: the architecture.
    params: from `split_parameters`.
    encoded: output of the encoder.
  """
  dtype = config.dtype

  def norm(name: str, x: jax.Array) -> Any:
    return LayerNorm(dtype, "norm").apply({"params": params[name]}, x)

  queries = params["query_embed"].astype(dtype)
  x = jnp.broadcast_to(queries, (len(encoded.out), *queries.shape))
  x = norm("layernorm_embedding", x)
  positions = norm(
    "pos_ln", params["embed_positions"][: len(queries)].astype(dtype)
  )
  own: Any = PositionBias(config).apply(
    {"params": params["self_position_bias"]}, positions, positions
  )
  cross = _cross_bias(config, params["cross_position_bias"], positions, encoded)
  # [b, e, s], transposed once for all layers.
  transposed = encoded.out.astype(dtype).swapaxes(1, 2)
  tables = params["token_rel_pos_table"].astype(own.dtype)[:, None]
  for i, weights in enumerate(params["layers"]):
    table = token_bias(tables[i], len(queries), config.token_bucket_size)
    x = _Layer(config).apply(
      {"params": weights["layer"]},
      x,
      own + table,
      lambda q, memory, w=weights: _attend(q, memory, w, transposed, cross),
      encoded.out.astype(dtype),
    )
  return norm("layer_norm", jnp.asarray(x))


def _cross_bias(
  config: ModelConfig,
  params: Params,
  positions: jax.Array,
  encoded: EncoderOutput,
) -> jax.Array:
  """Returns the bias of cross-attention, float32 [b, h n, s].

  The bias of the key projection is left out: it adds the same number to all
  logits of a query, which does not change the softmax.
  """
  projected: Any = Projection(config, 1).apply(
    {"params": params["query"]}, positions
  )
  q = projected[0]
  kernel = params["key"]["kernel"][:, 0].astype(q.dtype)
  q = jnp.einsum("nhd,ehd->hne", q * attention_scale(config), kernel)
  bias = q.reshape(-1, q.shape[-1]) @ encoded.positions.astype(q.dtype).T
  return jnp.where(encoded.mask[:, None], bias.astype(jnp.float32), LOWEST)


def _attend(
  q: jax.Array,
  memory: KeyValue,
  weights: Params,
  transposed: jax.Array,
  bias: jax.Array,
) -> jax.Array:
  """Attends from queries [b, n, h, d] to the encoder's outputs.

  Args:
    q: scaled queries.
    memory: the outputs [b, s, 1, e] as both keys and values.
    weights: maps of keys and values.
    transposed: the outputs [b, e, s].
    bias: float32 [b, h n, s].

  Returns:
    [b, n, h, d].
  """
  b, n, h, _ = q.shape
  key, value, value_bias = (
    weights[name].astype(q.dtype) for name in (_KEY, _VALUE, _VALUE_BIAS)
  )
  q = jnp.einsum("bnhd,hde->bhne", q, key).reshape(b, h * n, -1)
  logits = (q @ transposed).astype(jnp.float32) + bias
  attended = jax.nn.softmax(logits).astype(q.dtype) @ memory.value[:, :, 0]
  attended = attended.reshape(b, h, n, -1)
  # The value bias is added once: the weights of a query sum to 1.
  return jnp.einsum("bhne,hed->bnhd", attended, value) + value_bias


class _Layer(nn.Module):
  """A decoder layer with the parameters of `DecoderLayer` except "kv"."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: jax.Array, own_bias: jax.Array, attend: Any, memory: jax.Array
  ) -> jax.Array:
    """Maps [b, n, e] to [b, n, e]."""
    shared = memory[:, :, None]
    return decoder_layer(
      self.config,
      x,
      KeyValue(shared, shared),
      attend_to(own_bias, None),
      attend,
      lambda h, rate: h,
      jnp.zeros(()),
    )
