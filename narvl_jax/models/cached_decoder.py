"""The causal decoder with a cache of keys and values, for generation.

Pure functions of the decoder's parameters. Each hypothesis has its own cache
of generated tokens. The hypotheses of an example share the prompt and the
encoder's output, which are never copied or reordered.

Letters: b batch, k hypotheses, l new tokens, g generated tokens, p prompt
tokens, s source tokens, h heads, d head width, e model width, m positions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from narvl_jax.kernels.attend import LOWEST, KeyValue
from narvl_jax.models.attention import (
  LayerNorm,
  PositionBias,
  Projection,
)
from narvl_jax.models.autoregressive import Prompt, check_decoder_length
from narvl_jax.models.encoder import EncoderOutput
from narvl_jax.models.relative_bias import token_bias
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.models.transformer import decoder_layer
from narvl_jax.parallel.constraints import per_device

Params = Mapping[str, Any]


class LayerCache(NamedTuple):
  """Keys and values of a layer.

  Attributes:
    memory: [b, h, d, s] of the encoder's output. This is the layout of the
      attention products; another one would be transposed for every token.
    prompt: [b, p, h, d].
    generated: [b, k, g, h, d].
    self_bias: [h, m, m] attention bias between decoder positions.
  """

  memory: KeyValue
  prompt: KeyValue
  generated: KeyValue
  self_bias: jax.Array


class Cache(NamedTuple):
  """State between decoder passes.

  Attributes:
    layers: cache of every layer.
    cross_bias: [h, m, s] attention bias from decoder to encoder positions.
    memory_mask: bool [b, s], True where a source token is valid.
    start: int32 [b], cached prompt tokens; the position of the first new one.
  """

  layers: tuple[LayerCache, ...]
  cross_bias: jax.Array
  memory_mask: jax.Array
  start: jax.Array


def split_layers(params: Params, depth: int) -> Params:
  """Splits the stacked parameters of the layers.

  Call it once, outside of `jit`: inside, every call would copy them.

  Args:
    params: parameters of the causal decoder, unboxed.
    depth: number of layers.

  Returns:
    The parameters with a tuple of layers as "layers".
  """
  layers = tuple(
    jax.tree.map(lambda x, i=i: x[i], dict(params["layers"]))
    for i in range(depth)
  )
  return {**params, "layers": layers}


def start_cache(
  config: ModelConfig,
  params: Params,
  encoded: EncoderOutput,
  embedding: jax.Array,
  prompt: Prompt,
  *,
  hypotheses: int,
  length_limit: int,
) -> Cache:
  """Returns a cache of the prompt, which is read in one pass.

  Args:
    config: the architecture.
    params: parameters of the decoder, from `split_layers`.
    encoded: output of the encoder.
    embedding: the tied table [v, e].
    prompt: all of it but the last token is cached. The last token is the input
      of the first step; with bos alone, nothing is read.
    hypotheses: k, hypotheses of each example.
    length_limit: g, most new tokens.

  Raises:
    UserError: prompt and new tokens exceed the position table.
  """
  read = prompt.ids.shape[1] - 1
  size = read + length_limit
  check_decoder_length(config, size)
  pos = _apply(LayerNorm(config.dtype, "norm"), params["pos_ln"])(
    params["embed_positions"][:size].astype(config.dtype)
  )
  own_bias = _apply(PositionBias(config), params["self_position_bias"])
  cross_bias = _apply(PositionBias(config), params["cross_position_bias"])
  biases = own_bias(pos, pos)
  tables = params["token_rel_pos_table"].astype(config.dtype)
  batch, heads = len(prompt.ids), (config.num_heads, config.head_width)
  layers = []
  for i, layer in enumerate(params["layers"]):
    project = _apply(Projection(config, 2), layer["encoder_attn"]["kv"])
    shape = (batch, hypotheses, length_limit, *heads)
    nothing = jnp.zeros((batch, 0, *heads), config.dtype)
    table = per_device(tables[i], None, "heads")
    bias = biases + token_bias(table, size, config.token_bucket_size)
    layers.append(
      LayerCache(
        memory=KeyValue(
          *(x.transpose(0, 2, 3, 1) for x in project(encoded.out))
        ),
        prompt=KeyValue(nothing, nothing),
        generated=KeyValue(*(jnp.zeros(shape, config.dtype),) * 2),
        self_bias=bias[0],
      )
    )
  cache = Cache(
    layers=tuple(layers),
    cross_bias=cross_bias(pos, encoded.positions)[0],
    memory_mask=encoded.mask,
    start=jnp.zeros(batch, jnp.int32),
  )
  if read:
    cache = _read_prompt(config, params, cache, embedding, prompt, read)
  return cache._replace(start=prompt.length - 1)


def _read_prompt(
  config: ModelConfig,
  params: Params,
  cache: Cache,
  embedding: jax.Array,
  prompt: Prompt,
  read: int,
) -> Cache:
  """Runs all but the last column of the prompt as one hypothesis."""
  batch, heads = len(prompt.ids), (config.num_heads, config.head_width)
  empty = KeyValue(*(jnp.zeros((batch, 1, read, *heads), config.dtype),) * 2)
  single = cache._replace(
    layers=tuple(layer._replace(generated=empty) for layer in cache.layers)
  )
  tokens = prompt.ids[:, None, :read]
  _, filled = extend(config, params, single, embedding, tokens, 0)
  layers = tuple(
    old._replace(prompt=KeyValue(*(x[:, 0] for x in new.generated)))
    for old, new in zip(cache.layers, filled.layers, strict=True)
  )
  return cache._replace(layers=layers)


def extend(
  config: ModelConfig,
  params: Params,
  cache: Cache,
  embedding: jax.Array,
  tokens: jax.Array,
  t: int | jax.Array,
) -> tuple[jax.Array, Cache]:
  """Runs new tokens of every hypothesis through the decoder.

  Args:
    config: the architecture.
    params: parameters of the decoder, from `split_layers`.
    cache: the prompt and t generated tokens of every hypothesis.
    embedding: the tied table [v, e].
    tokens: int32 [b, k, l].
    t: int32, generated tokens in the cache.

  Returns:
    States [b, k, l, e] after the last LayerNorm, and the extended cache.
  """
  b, k, length = tokens.shape
  x = jnp.take(embedding, tokens.reshape(b, k * length), axis=0)
  x = x.astype(config.dtype)
  x = _apply(LayerNorm(config.dtype, "norm"), params["layernorm_embedding"])(x)
  # Positions [b, l] of the new tokens, equal for all hypotheses.
  places = cache.start[:, None] + t + jnp.arange(length)
  # [b, h, k l, s].
  cross = cache.cross_bias[:, places].swapaxes(0, 1)
  cross = jnp.tile(cross, (1, 1, k, 1)).astype(jnp.float32)
  mask = cache.memory_mask[:, None, None]
  cross = jnp.where(mask, cross, LOWEST)
  layers = []
  for weights, layer in zip(params["layers"], cache.layers, strict=True):
    step = _CachedLayer(config)
    x, generated = step.apply(
      {"params": weights}, x, layer, cache.start, places, t, cross
    )  # pyright: ignore[reportGeneralTypeIssues]
    layers.append(layer._replace(generated=generated))
  x = _apply(LayerNorm(config.dtype, "norm"), params["layer_norm"])(x)
  return x.reshape(b, k, length, -1), cache._replace(layers=tuple(layers))


def reorder(cache: Cache, parents: jax.Array) -> Cache:
  """Returns the cache in which hypothesis k continues parents[b, k]."""
  index = parents[:, :, None, None, None]
  layers = tuple(
    layer._replace(
      generated=KeyValue(
        *(jnp.take_along_axis(x, index, axis=1) for x in layer.generated)
      )
    )
    for layer in cache.layers
  )
  return cache._replace(layers=layers)


class _CachedLayer(nn.Module):
  """A decoder layer with the parameters of `DecoderLayer`."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    cache: LayerCache,
    start: jax.Array,
    places: jax.Array,
    t: jax.Array,
    cross_bias: jax.Array,
  ) -> tuple[jax.Array, KeyValue]:
    """Maps [b, k l, e] to [b, k l, e]; also returns `generated`, extended."""
    b, k = cache.generated.key.shape[:2]
    longer = cache.generated

    def attend(q: jax.Array, own: KeyValue) -> jax.Array:
      nonlocal longer
      longer = KeyValue(
        *(
          jax.lax.dynamic_update_slice_in_dim(
            old, new.reshape(b, k, -1, *new.shape[2:]), t, axis=2
          )
          for old, new in zip(cache.generated, own, strict=True)
        )
      )
      return _attend_cached(q, cache, longer, start, places, t)

    x = decoder_layer(
      self.config,
      x,
      # Passed unchanged to `_attend_memory`.
      cache.memory,
      attend,
      lambda q, memory: _attend_memory(q, memory, cross_bias),
      lambda h, rate: h,
      jnp.zeros(()),
    )
    return x, longer


def _attend_memory(
  q: jax.Array, memory: KeyValue, bias: jax.Array
) -> jax.Array:
  """Attends from new tokens [b, k l, h, d]; bias float32 [b, h, k l, s]."""
  logits = jnp.einsum("bqhd,bhds->bhqs", q, memory.key).astype(jnp.float32)
  # A bias of `LOWEST` is so large that adding a logit does not change it.
  weights = jax.nn.softmax(logits + bias).astype(memory.value.dtype)
  return jnp.einsum("bhqs,bhds->bqhd", weights, memory.value)


def _attend_cached(
  q: jax.Array,
  cache: LayerCache,
  generated: KeyValue,
  start: jax.Array,
  places: jax.Array,
  t: jax.Array,
) -> jax.Array:
  """Attends from new tokens [b, k l, h, d] to prompt and hypothesis."""
  b, k, g, *_ = generated.key.shape
  length = places.shape[1]
  q = q.reshape(b, k, length, *q.shape[2:])
  size = cache.self_bias.shape[-1]
  rows = cache.self_bias[:, places].swapaxes(0, 1)  # [b, h, l, m]
  columns = jnp.minimum(start[:, None] + jnp.arange(g), size - 1)
  own_bias = jnp.take_along_axis(rows, columns[:, None, None], axis=-1)
  prompt = cache.prompt.key.shape[1]
  # The rest of the buffer is not filled yet.
  seen = jnp.arange(g) <= t + jnp.arange(length)[:, None]
  known = jnp.arange(prompt) < start[:, None]
  logits = jnp.concatenate(
    [
      _masked(
        jnp.einsum("bklhd,bphd->bkhlp", q, cache.prompt.key),
        rows[..., :prompt],
        known[:, None, None, None],
      ),
      _masked(
        jnp.einsum("bklhd,bkghd->bkhlg", q, generated.key), own_bias, seen
      ),
    ],
    axis=-1,
  )
  weights = jax.nn.softmax(logits).astype(generated.value.dtype)
  out = jnp.einsum("bkhlp,bphd->bklhd", weights[..., :prompt], cache.prompt[1])
  out += jnp.einsum(
    "bkhlg,bkghd->bklhd", weights[..., prompt:], generated.value
  )
  return out.reshape(b, k * length, *out.shape[3:])


def _masked(logits: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
  """Adds a bias [b, h, l, *] to logits [b, k, h, l, *], in float32."""
  logits = logits.astype(jnp.float32) + bias[:, None].astype(jnp.float32)
  return jnp.where(mask, logits, LOWEST)


def _apply(module: nn.Module, params: Params) -> Any:
  """Returns a module with its parameters as a function of its inputs."""
  return lambda *inputs: module.apply({"params": params}, *inputs)
