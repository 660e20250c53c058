"""Settings and arguments of the official recipes; see `docs/recipes.md`.

The global settings of the official scripts, and the arguments that follow the
colon: `--config=configs/refcoco.py:size=base,epochs=10`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from narvl_jax.configs.common import (
  default_config,
  evaluation_source,
  train_source,
  update,
)
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import Config

SIZES: tuple[str, ...] = ("tiny", "medium", "base", "large", "huge")
# Sizes whose parameters and Adam moments exceed one TPU v5e chip.
_SPLIT_SIZES = ("large", "huge")
# Rows of a part of the batch: 8 per chip on 16 chips; large models: 4.
_ROWS_AT_A_TIME, _ROWS_OF_SPLIT_SIZES = 128, 64
_ARGUMENTS = ("size", "epochs", "data", "split")

# Settings that all official scripts share.
SETTINGS: dict[str, Any] = {
  # As in the official checkpoints: 59,458 classes.
  "vocabulary.source": "official",
  "vocabulary.num_codes": 8192,
  "vocabulary.num_bins": 1000,
  "model.dropout": 0.1,
  # The official code computes in float16.
  "model.dtype": "bfloat16",
  "model.remat": "full",
  "optimizer.name": "adamw",
  "optimizer.schedule": "linear",
  "optimizer.weight_decay": 0.01,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.eps": 1e-8,
  "optimizer.eps_placement": "official",
  "optimizer.clip_norm": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Settings of one official script, or of a substitute for a missing one.

  Attributes:
    learning_rate: its peak.
    epochs: passes over the training file.
    drop_path: stochastic depth of the last layer of encoder and decoder.
    warmup: share of the updates; 0 also keeps the rate constant, because the
      official schedule then never learns how long the run is.
    seed: seed of the run.
  """

  learning_rate: float
  epochs: int
  drop_path: float
  warmup: float = 0.06
  seed: int = 1


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set of OFA's TSV files, `NAME_{split}.tsv`.

  Attributes:
    name: name of the files, the entries and the config.
    task: task of its examples.
    train_rows: published number of rows of the training file, replaced by the
      number in the file when a run starts.
    train: split to train on.
    validation: split that is evaluated after each epoch.
    test: split that is evaluated at the end.
    test_columns: columns of the evaluated splits; empty for the usual ones.
    partition: name of the way in which papers split the data, if there are
      several.
  """

  name: str
  task: str
  train_rows: int
  train: str = "train"
  validation: str = "val"
  test: str = "test"
  test_columns: str = ""
  partition: str = ""


def parse_arguments(arg: str, name: str) -> dict[str, str]:
  """Parses the text after the colon, such as "size=base,epochs=10" or "base".

  Args:
    arg: pairs KEY=VALUE, separated by commas; a size may omit its key.
    name: name of the config, for messages.

  Returns:
    The given values by name.

  Raises:
    UserError: an argument or a size is unknown, or given twice.
  """
  found: dict[str, str] = {}
  for part in filter(None, arg.split(",")):
    key, equals, value = part.partition("=")
    if not equals:
      key, value = "size", part
    if key not in _ARGUMENTS:
      raise UserError(
        f'configs/{name}.py has no argument "{key}".'
        f"{did_you_mean(key, _ARGUMENTS)} (--config=FILE.py:size=base,epochs=5)"
      )
    if key in found:
      raise UserError(
        f'configs/{name}.py: argument "{key}" is given twice, as'
        f' "{found[key]}" and "{value}" (--config=FILE.py:{key}={value})'
      )
    found[key] = value
  size = found.setdefault("size", "base")
  if size not in SIZES:
    raise UserError(
      f'configs/{name}.py has no size "{size}".{did_you_mean(size, SIZES)}'
      " (--config=FILE.py:size=SIZE)"
    )
  epochs = found.get("epochs", "1")
  if not epochs.isdecimal() or int(epochs) < 1:
    raise UserError(
      f'configs/{name}.py: epochs="{epochs}" is not a whole number of at least'
      " 1 (--config=FILE.py:epochs=1)"
    )
  return found


def official_config(
  arg: str,
  dataset: Dataset,
  recipes: Mapping[str, Recipe],
  values: Mapping[str, Any],
) -> Config:
  """Returns the config of a recipe.

  Updates and warm-up are derived from `train.batch_size` unless they are set,
  so that a run with another batch size has as many epochs.

  Args:
    arg: see `parse_arguments`.
    dataset: the data set to train and evaluate.
    recipes: recipe by size.
    values: settings of the task, {"train.batch_size": 128}.

  Raises:
    UserError: an argument is wrong.
  """
  given = parse_arguments(arg, dataset.name)
  size = given["size"]
  recipe = recipes[size]
  config = default_config(dataset.task)
  path = f"{given.get('data', 'data')}/{dataset.name}_{{split}}.tsv"
  split = given.get("split", dataset.train)
  config.data.train[dataset.name] = train_source(
    "ofa_tsv", dataset.task, split=split, path=path
  )
  options = {"columns": dataset.test_columns} if dataset.test_columns else {}
  config.data.evaluation[dataset.name] = evaluation_source(
    "ofa_tsv",
    dataset.task,
    partition=dataset.partition,
    path=path,
    **options,
  )
  update(
    config,
    {
      **SETTINGS,
      "seed": recipe.seed,
      "model.size": size,
      "model.encoder_drop_path": recipe.drop_path,
      "model.decoder_drop_path": recipe.drop_path,
      # The running statistics come from millions of pictures; the official
      # code uses those of the 1 to 16 pictures on a GPU.
      "model.batch_norm": "frozen",
      "loss.confidence": "temper",
      "optimizer.learning_rate": recipe.learning_rate,
      "train.eval_split": dataset.validation,
      # All examples: this evaluation selects the best checkpoint.
      "train.eval_examples": 1_000_000,
      "evaluation.split": dataset.test,
      **values,
    },
  )
  rows_at_a_time = _ROWS_AT_A_TIME
  if size in _SPLIT_SIZES:
    update(config, {"mesh.data": 1, "mesh.fsdp": -1})
    rows_at_a_time = _ROWS_OF_SPLIT_SIZES
  parts = config.train.batch_size // rows_at_a_time
  update(config, {"train.accumulation_steps": parts})
  if not recipe.warmup:
    update(config, {"optimizer.schedule": "constant"})
  config.train.epoch_examples = dataset.train_rows
  epochs = int(given.get("epochs", recipe.epochs))
  _set_lengths(config, epochs, recipe.warmup)
  return config


def _set_lengths(config: Config, epochs: int, warmup: float) -> None:
  """Sets numbers of steps that follow from the batch size and the epoch."""
  rows = config.train.get_ref("epoch_examples")
  batch_size = config.train.get_ref("batch_size")
  # Rounded up: the official code fills the last batch with dummies.
  per_epoch = (rows + batch_size - 1) // batch_size
  with config.unlocked():
    config.train.eval_every = per_epoch
    config.train.steps = per_epoch * epochs
    # An integer fraction, because 0.06 has no exact binary value.
    share = math.floor(1000 * warmup + 0.5)
    steps = config.train.get_ref("steps")
    config.optimizer.warmup_steps = (steps * share) // 1000
