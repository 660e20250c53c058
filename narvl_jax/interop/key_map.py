"""The table of official keys that each array of a model contains."""

import dataclasses
import re
from collections.abc import Iterator

from narvl_jax.errors import UserError
from narvl_jax.models import ModelConfig

# Our path below "params", the official name, and a key of `_KINDS`. "*" is the
# layer, stacked on our leading axis; braces list tensors that are fused.
_ATTENTION = (
  ("/qkv", ".{q,k,v}_proj", "heads"),
  ("/out", ".out_proj", "from_heads"),
  ("/c_attn", ".c_attn", "vector"),
)
_CROSS_ATTENTION = (
  ("/q", ".{q}_proj", "heads"),
  ("/kv", ".{k,v}_proj", "heads"),
  *_ATTENTION[1:],
)
_FEED_FORWARD = (
  ("/ffn/fc1", ".fc1", "linear"),
  ("/ffn/ffn_layernorm", ".ffn_layernorm", "norm"),
  ("/ffn/fc2", ".fc2", "linear"),
  ("/final_layer_norm", ".final_layer_norm", "norm"),
)
_ENCODER_LAYER = (
  ("/self_attn_layer_norm", ".self_attn_layer_norm", "norm"),
  *((f"/self_attn{a}", f".self_attn{b}", kind) for a, b, kind in _ATTENTION),
  ("/attn_ln", ".attn_ln", "norm"),
  *_FEED_FORWARD,
)
_DECODER_LAYER = (
  ("/self_attn_layer_norm", ".self_attn_layer_norm", "norm"),
  *((f"/self_attn{a}", f".self_attn{b}", kind) for a, b, kind in _ATTENTION),
  ("/self_attn_ln", ".self_attn_ln", "norm"),
  ("/encoder_attn_layer_norm", ".encoder_attn_layer_norm", "norm"),
  *(
    (f"/encoder_attn{a}", f".encoder_attn{b}", kind)
    for a, b, kind in _CROSS_ATTENTION
  ),
  ("/cross_attn_ln", ".cross_attn_ln", "norm"),
  *_FEED_FORWARD,
)
_ENCODER = (
  ("/embed_positions", ".embed_positions", "table"),
  ("/embed_image_positions", ".embed_image_positions", "table"),
  ("/type_embedding", ".type_embedding", "table"),
  ("/layernorm_embedding", ".layernorm_embedding", "norm"),
  ("/patch_layernorm_embedding", ".patch_layernorm_embedding", "norm"),
  ("/pos_ln", ".pos_ln", "norm"),
  ("/image_pos_ln", ".image_pos_ln", "norm"),
  ("/position_bias/query", ".{pos_q}_linear", "heads"),
  ("/position_bias/key", ".{pos_k}_linear", "heads"),
  ("/image_proj", ".image_proj", "linear"),
  ("/token_rel_pos_table", ".token_rel_pos_table_list.*", "table"),
  ("/image_rel_pos_table", ".image_rel_pos_table_list.*", "table"),
  ("/layer_norm", ".layer_norm", "norm"),
)
# The autoregressive decoder reads tokens instead of queries.
_QUERIES = ("/query_embed", ".query_embed", "table")
_DECODER = (
  ("/embed_positions", ".embed_positions", "table"),
  ("/layernorm_embedding", ".layernorm_embedding", "norm"),
  ("/pos_ln", ".pos_ln", "norm"),
  ("/self_position_bias/query", ".{self_pos_q}_linear", "heads"),
  ("/self_position_bias/key", ".{self_pos_k}_linear", "heads"),
  ("/cross_position_bias/query", ".{cross_pos_q}_linear", "heads"),
  ("/cross_position_bias/key", ".{cross_pos_k}_linear", "heads"),
  ("/token_rel_pos_table", ".token_rel_pos_table_list.*", "table"),
  ("/layer_norm", ".layer_norm", "norm"),
)
_BLOCK = tuple(
  row
  for i in (1, 2, 3)
  for row in (
    (f"/conv{i}", f".conv{i}", "conv"),
    (f"/bn{i}", f".bn{i}", "batch_norm"),
  )
)
_FIRST_BLOCK = (
  *_BLOCK,
  ("/downsample_conv", ".downsample.0", "conv"),
  ("/downsample_bn", ".downsample.1", "batch_norm"),
)

# kind -> our collection and suffix, the official suffix, and the transform of
# the values.
_KINDS = {
  "vocabulary": [("params", "", ".weight", "vocabulary")],
  "table": [("params", "", ".weight", "same")],
  "vector": [("params", "", "", "same")],
  "norm": [
    ("params", "/scale", ".weight", "same"),
    ("params", "/bias", ".bias", "same"),
  ],
  "batch_norm": [
    ("params", "/scale", ".weight", "same"),
    ("params", "/bias", ".bias", "same"),
    ("batch_stats", "/mean", ".running_mean", "same"),
    ("batch_stats", "/var", ".running_var", "same"),
  ],
  "conv": [("params", "/kernel", ".weight", "conv")],
  "linear": [
    ("params", "_kernel", ".weight", "transpose"),
    ("params", "_bias", ".bias", "same"),
  ],
  "heads": [
    ("params", "/kernel", ".weight", "fused_kernel"),
    ("params", "/bias", ".bias", "fused_bias"),
  ],
  "from_heads": [
    ("params", "_kernel", ".weight", "merged_heads"),
    ("params", "_bias", ".bias", "same"),
  ],
}

TABLE_KEY = "encoder.embed_tokens.weight"
TIED_KEYS = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")

# Computed buffers, and decoder tables that only image generation reads.
IGNORED = re.compile(
  r"(encoder|decoder)\.(version|token_rp_bucket|image_rp_bucket)"
  r"|decoder\.image_position_idx"
  r"|.*\.num_batches_tracked"
  r"|decoder\.embed_image_positions\.weight"
  r"|decoder\.(image_pos_ln|code_layernorm_embedding)\.(weight|bias)"
  r"|decoder\.image_rel_pos_table_list\.\d+\.weight"
)


@dataclasses.dataclass(frozen=True)
class MappedArray:
  """One array of our tree and the official tensors that it contains.

  Attributes:
    path: collection and names in our tree.
    keys: official keys, one tuple of fused tensors for each layer.
    stacked: whether a leading axis counts the layers.
    transform: how the values are laid out, see `official._to_ours`.
  """

  path: tuple[str, ...]
  keys: tuple[tuple[str, ...], ...]
  stacked: bool
  transform: str


def key_map(config: ModelConfig) -> list[MappedArray]:
  """Returns the table of all arrays of `make_model(config)`.

  Raises:
    UserError: the configuration has parts that the official code lacks.
  """
  if config.image_encoder != "resnet":
    raise UserError(
      f'official weights need model.image_encoder="resnet", not '
      f'"{config.image_encoder}" (--config.model.image_encoder=resnet)'
    )
  leaves = []
  for path, name, kind, layers in _rows(config):
    for collection, suffix, official, transform in _KINDS[kind]:
      pattern = name + official
      leaves.append(
        MappedArray(
          path=(collection, *(path + suffix).split("/")),
          keys=tuple(_expand(pattern, layer) for layer in layers),
          stacked="*" in name,
          transform=transform,
        )
      )
  return leaves


def _rows(config: ModelConfig) -> Iterator[tuple[str, str, str, range]]:
  """Yields (our path, official pattern, kind, layers) of the whole model."""
  once = range(1)
  decoder = _DECODER
  if config.decoder == "parallel":
    decoder = (_QUERIES, *decoder)
  yield "embed_tokens", "encoder.embed_tokens", "vocabulary", once
  for side, depth, table, layer in (
    ("encoder", config.encoder_layers, _ENCODER, _ENCODER_LAYER),
    ("decoder", config.decoder_layers, decoder, _DECODER_LAYER),
  ):
    for ours, official, kind in table:
      layers = range(depth) if "*" in official else once
      yield side + ours, side + official, kind, layers
    for ours, official, kind in layer:
      path, name = f"{side}/layers{ours}", f"{side}.layers.*{official}"
      yield path, name, kind, range(depth)
  ours, official = "encoder/resnet", "encoder.embed_images"
  yield f"{ours}/conv1", f"{official}.conv1", "conv", once
  yield f"{ours}/bn1", f"{official}.bn1", "batch_norm", once
  for stage, blocks in enumerate(config.resnet_blocks, start=1):
    path, name = f"{ours}/layer{stage}", f"{official}.layer{stage}"
    for a, b, kind in _FIRST_BLOCK:
      yield f"{path}_first{a}", f"{name}.0{b}", kind, once
    for a, b, kind in _BLOCK if blocks > 1 else ():
      yield f"{path}_rest{a}", f"{name}.*{b}", kind, range(1, blocks)


def _expand(pattern: str, layer: int) -> tuple[str, ...]:
  """Inserts the layer; returns a key for each name in braces."""
  pattern = pattern.replace("*", str(layer))
  if "{" not in pattern:
    return (pattern,)
  before, rest = pattern.split("{")
  names, after = rest.split("}")
  return tuple(before + name + after for name in names.split(","))
