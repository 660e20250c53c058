"""Functions with which config files are written.

For example:

    from narvl_jax.configs.common import default_config, train_source

    def get_config(arg: str = ""):
      config = default_config("vqa")
      config.data.train.questions = train_source("shapes", "vqa")
      config.data.evaluation.questions = evaluation_source("shapes", "vqa")
      return config
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from narvl_jax.data.shards.distilled import distilled_sets
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import (
  default_config,
  evaluation_source,
  train_source,
)

__all__ = [
  "add_distilled",
  "choose_variant",
  "default_config",
  "evaluation_source",
  "from_scratch",
  "train_source",
  "update",
]


def choose_variant(arg: str, variants: Mapping[str, Any]) -> Any:
  """Returns the variant ARG of `--config=FILE.py:ARG`.

  Args:
    arg: text after the colon; empty for the variant named "".
    variants: variants by name.

  Raises:
    UserError: there is no such variant.
  """
  if arg not in variants:
    names = [name for name in variants if name]
    raise UserError(
      f'this config has no variant "{arg}".{did_you_mean(arg, names)}'
      " (--config=FILE.py:VARIANT)"
    )
  return variants[arg]


def update(config: ConfigDict, values: Mapping[str, Any]) -> None:
  """Sets several keys, `{"train.steps": 100}`; each must exist."""
  with config.unlocked():
    config.update_from_flattened_dict(dict(values))


def from_scratch(config: Any, *, width: int) -> None:
  """Sets the config of a small model that is trained from random weights.

  The most important change is Muon instead of AdamW. The others are
  convolutions instead of flat patches, linear maps initialised with standard
  deviation width ** -0.5, and targets without eos. `docs/experiments.md` has
  the measurements.

  Args:
    config: the config to change.
    width: model width D.
  """
  update(
    config,
    {
      "model.width": width,
      "model.mlp_width": 2 * width,
      "model.num_heads": 4,
      "model.image_encoder": "conv",
      "model.patch_size": 8,
      "model.entangle_positions": True,
      "model.init_stddev": width**-0.5,
      "model.dropout": 0.0,
      # Position tables as long as needed.
      "model.max_text_positions": 32,
      "model.token_bucket_size": 32,
      "model.image_bucket_size": 8,
      "model.vocab_multiple": 8,
      "data.max_text_length": 16,
      "optimizer.name": "muon",
      "optimizer.learning_rate": 3.5e-3,
      "optimizer.warmup_steps": 50,
      "optimizer.b2": 0.98,
    },
  )
  for task in config.tasks.values():
    task.eos = False
    # With more queries than labels, several queries may emit a label.
    task.merge_repeats = True


def add_distilled(config: ConfigDict, folder: str, weight: float = 0.5) -> None:
  """Adds a teacher's predictions to the training data of a config.

  Each data set NAME of the folder becomes an entry `distilled_NAME` of
  `data.train`, and receives part of the weight of the entry NAME.

  Args:
    config: the config to change; its `data.train` has an entry for each data
      set.
    folder: the folder `--to` of `python -m narvl_jax.distill`.
    weight: share of the teacher's predictions, above 0; 1 removes the original
      targets.

  Raises:
    UserError: the share is out of range, the folder has no complete data sets,
      or the config has no such entry.
  """
  if not 0 < weight <= 1:
    near = 1.0 if weight > 1 else 0.5
    raise UserError(
      f"add_distilled(weight={weight}): the share must be above 0, at most 1;"
      f" such as weight={near}"
    )
  data: Any = config.data
  entries = data.train
  for found in distilled_sets(pathlib.Path(folder)):
    entry = entries.get(found.name)
    if entry is None or entry.task != found.task:
      names = [name for name in entries if entries[name].task == found.task]
      raise UserError(
        f'"{folder}" has the data set "{found.name}" of the task {found.task},'
        f" and data.train has no such entry.{did_you_mean(found.name, names)}"
        " Rename the entry, or add the data set with train_source"
      )
    whole = entry.get("weight", 1.0)
    with config.unlocked(), config.ignore_type():
      entry.weight = _scaled(whole, 1 - weight)
      entries[f"distilled_{found.name}"] = train_source(
        found.source,
        found.task,
        split=found.split,
        weight=_scaled(whole, weight),
        **found.options,
      )


def _scaled(weight: Any, factor: float) -> Any:
  """Returns a weight, or the weights of a schedule, times a factor."""
  if isinstance(weight, int | float):
    return weight * factor
  return tuple((step, value * factor) for step, value in weight)
