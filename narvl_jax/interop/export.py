"""Weights as a checkpoint of the official code."""

import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from narvl_jax.interop.key_map import TABLE_KEY
from narvl_jax.interop.official import official_from_variables
from narvl_jax.interop.settings import size_of
from narvl_jax.interop.tensors import PathLike, State
from narvl_jax.interop.torch_write import write_torch
from narvl_jax.models import ModelConfig, positions

_TOKEN_POSITIONS = 1024
_VERSION = 3.0
# The grid of image codes that the official decoder can generate; padding.
_CODE_GRID, _CODE_FILLER = 16, 1024
# Prefix of architecture names, and class of the loss.
_ARCHITECTURES = {"parallel": "na_ofa_", "autoregressive": "ofa_"}
_CRITERIA = {
  "parallel": "LabelSmoothedDualImitationCriterion",
  "autoregressive": "AdjustLabelSmoothedCrossEntropyCriterion",
}
# Settings that OFA lacks.
_PARALLEL = {
  "apply_bert_init": True,
  "decoder_input_type": "query",
  "dynamic_upsample": True,
  "glat_sampling_ratio": 0.0,
  "latent_dim": 0,
  "src_upsample": 1.0,
}
_RESNETS = {(3, 4, 6): "resnet50", (3, 4, 23): "resnet101"}


def save_official(
  path: PathLike,
  config: ModelConfig,
  variables: Mapping[str, Any],
  *,
  unused: State | None = None,
  settings: Mapping[str, Any] | None = None,
) -> list[str]:
  """Writes an official checkpoint; returns the keys that `unused` lacks.

  Args:
    config: the architecture; the decoder selects NARVL or OFA.
    variables: {"params", "batch_stats"} of arrays, unboxed; dtypes are kept.
    unused: official tensors that only image generation reads; those that are
      missing or of another shape become zeros and ones.
    settings: "args" and "cfg" of the file that the weights came from.

  Raises:
    UserError: the architecture has parts that the official code lacks.
  """
  # No copies: each tensor is copied while it is written.
  arrays = jax.tree.map(np.asarray, dict(variables))
  state: dict[str, Any] = official_from_variables(arrays, config)
  made = []
  for key, value in _unused_tensors(config, state).items():
    given = (unused or {}).get(key)
    if given is None or tuple(given.shape) != value.shape:
      made.append(key)
      given = value
    state[key] = given
  state |= _buckets(config)
  content = {
    "args": None,
    "cfg": _settings(config, settings),
    "model": state,
    **_progress(config),
  }
  write_torch(path, content)
  return made


def _progress(config: ModelConfig) -> dict[str, Any]:
  """Returns the state of a run before its first update."""
  return {
    "criterion": None,
    "optimizer_history": [
      {
        "criterion_name": _CRITERIA[config.decoder],
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {"best": None},
        "num_updates": 0,
      }
    ],
    "task_state": {},
    "extra_state": {
      "metrics": [],
      "previous_training_time": 0.0,
      "val_loss": None,
      "train_iterator": {
        "version": 2,
        "epoch": 1,
        "iterations_in_epoch": 0,
        "shuffle": True,
      },
    },
  }


def _unused_tensors(
  config: ModelConfig, state: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns tensors that the official code requires, with neutral values."""
  dtype, width = state[TABLE_KEY].dtype, config.width
  code_ids = np.full(_TOKEN_POSITIONS + 2, _CODE_FILLER, np.int64)
  code_ids[0] = 0
  grid = positions.image_position_ids(
    _CODE_GRID, _CODE_GRID, config.image_bucket_size
  )
  code_ids[1 : 1 + len(grid)] = grid
  rows = positions.num_image_positions(config.image_bucket_size)
  buckets = positions.num_image_buckets(config.image_bucket_size)
  out: dict[str, np.ndarray] = {
    "encoder.version": np.full(1, _VERSION, dtype),
    "decoder.version": np.full(1, _VERSION, dtype),
    "decoder.image_position_idx": code_ids,
    "decoder.embed_image_positions.weight": np.zeros((rows, width), dtype),
  }
  for name in ("image_pos_ln", "code_layernorm_embedding"):
    out[f"decoder.{name}.weight"] = np.ones(width, dtype)
    out[f"decoder.{name}.bias"] = np.zeros(width, dtype)
  for layer in range(config.decoder_layers):
    key = f"decoder.image_rel_pos_table_list.{layer}.weight"
    out[key] = np.zeros((buckets, config.num_heads), dtype)
  for key in state:
    if key.endswith(".running_mean"):
      counter = key.replace("running_mean", "num_batches_tracked")
      out[counter] = np.zeros((), np.int64)
  return out


def _buckets(config: ModelConfig) -> dict[str, np.ndarray]:
  """Returns the tables of relative positions."""
  token = positions.token_buckets(
    _TOKEN_POSITIONS, config.token_bucket_size, _TOKEN_POSITIONS
  ).astype(np.int64)
  side = config.image_bucket_size
  distances = positions.num_image_buckets(side)
  image = np.empty((side**2 + 1,) * 2, np.int64)
  image[1:, 1:] = positions.image_buckets(side, side, side)
  image[0], image[:, 0], image[0, 0] = (
    distances - 3,
    distances - 2,
    distances - 1,
  )
  return {
    f"{part}.{kind}_rp_bucket": table
    for part in ("encoder", "decoder")
    for kind, table in (("token", token), ("image", image))
  }


def _settings(
  config: ModelConfig, settings: Mapping[str, Any] | None
) -> dict[str, Any]:
  """Returns `cfg` of the source, updated, or that of the official scripts."""
  cfg = dict((settings or {}).get("cfg") or {})
  model = dict(_defaults(config))
  known = cfg.get("model") or (settings or {}).get("args")
  if isinstance(known, types.SimpleNamespace):
    arch = str(getattr(known, "arch", ""))
    # Settings of OFA cannot build NARVL, nor the reverse.
    same = arch.startswith(_ARCHITECTURES[config.decoder])
    keep = vars(known) if same else {}
    model = {**_defaults(config), **keep, **_architecture(config)}
  cfg["model"] = types.SimpleNamespace(**model)
  cfg.setdefault("task", None)
  cfg.setdefault("criterion", None)
  return cfg


def _architecture(config: ModelConfig) -> dict[str, Any]:
  """Returns the settings that shapes depend on."""
  each = {
    "embed_dim": config.width,
    "ffn_embed_dim": config.mlp_width,
    "attention_heads": config.num_heads,
  }
  parallel = config.decoder == "parallel"
  return {
    **{f"encoder_{key}": value for key, value in each.items()},
    **{f"decoder_{key}": value for key, value in each.items()},
    "encoder_layers": config.encoder_layers,
    "decoder_layers": config.decoder_layers,
    "decoder_input_dim": config.width,
    "decoder_output_dim": config.width,
    **({"num_queries": config.num_queries} if parallel else {}),
    "token_bucket_size": config.token_bucket_size,
    "image_bucket_size": config.image_bucket_size,
    "max_source_positions": config.max_text_positions - 2,
    "max_target_positions": config.max_text_positions - 2,
  }


def _defaults(config: ModelConfig) -> dict[str, Any]:
  """Returns the settings of the official scripts."""
  size, _ = size_of(vars(config))
  size = "tiny" if size == "micro" else size
  arch = _ARCHITECTURES[config.decoder] + size
  parallel = config.decoder == "parallel"
  flags = (
    "encoder_normalize_before",
    "decoder_normalize_before",
    "encoder_learned_pos",
    "decoder_learned_pos",
    "share_decoder_input_output_embed",
    "share_all_embeddings",
    "layernorm_embedding",
    "patch_layernorm_embedding",
    "code_layernorm_embedding",
    "add_type_embedding",
    "scale_attn",
    "scale_fc",
    "scale_heads",
    "disable_entangle",
    "no_scale_embedding",
  )
  return {
    "_name": arch,
    "arch": arch,
    "dropout": config.dropout,
    "attention_dropout": 0.0,
    "encoder_drop_path_rate": config.encoder_drop_path,
    "decoder_drop_path_rate": config.decoder_drop_path,
    "resnet_drop_path_rate": 0.0,
    "resnet_type": _RESNETS.get(config.resnet_blocks, "resnet152"),
    "activation_fn": "gelu",
    "attn_scale_factor": 2,
    "add_blank_id_to_dict": parallel,
    **dict.fromkeys(flags, True),
    **(_PARALLEL if parallel else {}),
    **_architecture(config),
  }
