"""Small official state dicts with different values in every tensor."""

import pathlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from narvl_jax.interop import key_map, official_from_variables, official_shapes
from narvl_jax.interop.key_map import TABLE_KEY, TIED_KEYS
from narvl_jax.interop.official import _abstract_variables
from narvl_jax.interop.settings import QUERY_KEY
from narvl_jax.interop.torch_write import write_torch
from narvl_jax.models import ModelConfig, model_config
from tests.support.tiny import tiny_config

CONFIG = model_config(
  "micro",
  width=12,
  mlp_width=20,
  num_heads=3,
  encoder_layers=3,
  decoder_layers=2,
  resnet_blocks=(1, 3, 2),
  resnet_width=4,
  num_queries=4,
  vocab_size=50,
  max_text_positions=26,
  token_bucket_size=4,
  image_bucket_size=3,
)
# Ids of the vocabulary `words`.
COUNTS: Any = {"num_codes": 2, "num_bins": 4}
BASE = 50 - 4 - 2 - 6
State = dict[str, np.ndarray]


def check_coverage(config: ModelConfig) -> None:
  """Asserts that each official tensor fills one variable, and fills all."""
  leaves = key_map.key_map(config)
  keys = [key for leaf in leaves for part in leaf.keys for key in part]
  paths = [leaf.path for leaf in leaves]
  variables: Any = flatten_dict(_abstract_variables(config))
  assert len(set(keys)) == len(keys), "an official tensor is used twice"
  assert len(set(paths)) == len(paths), "a variable is filled twice"
  assert set(paths) == set(variables), "a variable is not filled"


def narvl_state(dtype: Any = np.float32) -> State:
  """Returns a NARVL with the tables that only image generation reads."""
  rng = np.random.default_rng(0)
  shapes = official_shapes(CONFIG) | {
    "decoder.embed_image_positions.weight": (10, 12),
    "decoder.image_pos_ln.weight": (12,),
    "decoder.image_rel_pos_table_list.1.weight": (28, 3),
  }
  state = {
    key: rng.standard_normal(shape, np.float32).astype(dtype)
    for key, shape in shapes.items()
  }
  for key in state:
    if key.endswith("running_var"):
      state[key] = np.abs(state[key])
  state |= {key: state[TABLE_KEY] for key in TIED_KEYS}
  state["encoder.embed_images.bn1.num_batches_tracked"] = np.array(7)
  return state


def ofa_state(dtype: Any = np.float32) -> State:
  """Returns an OFA: weights without queries and blank."""
  state = narvl_state(dtype)
  del state[QUERY_KEY]
  table = state[TABLE_KEY][:-1]
  return state | {key: table for key in (TABLE_KEY, *TIED_KEYS)}


def save(path: pathlib.Path, state: State, **more: Any) -> pathlib.Path:
  """Writes an official file."""
  write_torch(path, {"model": state, **more})
  return path


def back(made: Any) -> State:
  """Returns the official tensors of a conversion."""
  return official_from_variables(made.variables, made.config)


def fitting_config() -> Any:
  """A config whose pictures and prompts fit the small tables."""
  config = tiny_config()
  config.model = type(config)(config.model.to_dict())
  for name in config.model:
    if name not in ("size", "dtype"):
      config.model[name] = None
  config.data.max_text_length = 26
  return config
