"""What the experiments share.

A config file builds on these:

    from configs.common import default_config, evaluation_source, train_source

    def get_config(arg: str = ""):
      config = default_config("vqa")
      config.data.train.questions = train_source("shapes", "vqa")
      config.data.evaluation.questions = evaluation_source("shapes", "vqa")
      return config
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from narvl_jax.config import (
  default_config,
  evaluation_source,
  train_source,
)
from narvl_jax.errors import UserError, did_you_mean

__all__ = [
  "choose_variant",
  "default_config",
  "evaluation_source",
  "train_source",
  "update",
]


def choose_variant(arg: str, variants: Mapping[str, Any]) -> Any:
  """Returns the variant that `--config=FILE.py:ARG` asks for.

  Args:
    arg: what follows the colon; empty for the variant named "".
    variants: by their name.

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
