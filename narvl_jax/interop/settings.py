"""The architecture of a model, read from the shapes of a state dict."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from narvl_jax.interop.key_map import TABLE_KEY
from narvl_jax.models import model_config
from narvl_jax.models.sizes import SIZES

QUERY_KEY = "decoder.query_embed.weight"
IMAGE_POSITIONS_KEY = "encoder.embed_image_positions.weight"
# Fields that distinguish the named sizes.
_OF_A_SIZE = (
  "width",
  "mlp_width",
  "num_heads",
  "encoder_layers",
  "decoder_layers",
  "resnet_blocks",
)


def settings_of(state: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of `ModelConfig` that the shapes determine.

  Args:
    state: official key -> tensor; only shapes are used.
  """

  def rows(key: str, axis: int = 0) -> int | None:
    shape = np.shape(state[key]) if key in state else ()
    return shape[axis] if len(shape) > axis else None

  def count(prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found = (pattern.match(key) for key in state)
    return len({match[1] for match in found if match})

  token_buckets = rows("encoder.token_rel_pos_table_list.0.weight")
  trunk = "encoder.embed_images"
  blocks = tuple(count(f"{trunk}.layer{i}") for i in (1, 2, 3))
  found = {
    "width": rows(TABLE_KEY, 1),
    "mlp_width": rows("encoder.layers.0.fc1.weight"),
    "num_heads": rows("encoder.layers.0.self_attn.c_attn"),
    "encoder_layers": count("encoder.layers"),
    "decoder_layers": count("decoder.layers"),
    "resnet_blocks": blocks if all(blocks) else None,
    "resnet_width": rows(f"{trunk}.conv1.weight"),
    "decoder": _decoder(state),
    "num_queries": rows(QUERY_KEY),
    "vocab_size": rows(TABLE_KEY),
    "max_text_positions": rows("encoder.embed_positions.weight"),
    "image_bucket_size": _image_bucket_size(
      rows("encoder.image_rel_pos_table_list.0.weight"),
      rows(IMAGE_POSITIONS_KEY),
    ),
    "token_bucket_size": token_buckets and (token_buckets + 1) // 2,
  }
  return {name: value for name, value in found.items() if value}


def _decoder(state: Mapping[str, Any]) -> str | None:
  """Returns the kind of decoder; None if there is none."""
  if QUERY_KEY in state:
    return "parallel"
  # All other keys are the same.
  if any(key.startswith("decoder.layers.") for key in state):
    return "autoregressive"
  return None


def _image_bucket_size(
  distances: int | None, positions: int | None
) -> int | None:
  """Returns the side of the grid; early files lack some positions."""
  if distances and distances > 3:
    return (math.isqrt(distances - 3) + 1) // 2
  return math.isqrt(positions - 1) if positions else None


def size_of(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
  """Returns the section `model` of a config.

  Args:
    settings: fields of `ModelConfig`.

  Returns:
    The named size, "micro" if no official one matches, and the fields that
    differ from it, without `vocab_size`.
  """
  size = "micro"
  for name in SIZES:
    known = vars(model_config(name))
    if all(settings.get(key) == known[key] for key in _OF_A_SIZE):
      size = name
      break
  known = vars(model_config(size))
  return size, {
    key: value
    for key, value in settings.items()
    if value != known[key] and key != "vocab_size"
  }
