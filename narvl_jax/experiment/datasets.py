"""Opens the data sets that a config names."""

import math
from collections.abc import Sequence
from typing import Any

from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.example import Record
from narvl_jax.data.sources import load_source
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import Config


def load_mixture(config: Config) -> list[MixtureEntry]:
  """Opens the sources of `data.train`.

  Raises:
    UserError: a source, a split or an option does not exist.
  """
  mixture = []
  for name, entry in config.data.train.items():
    try:
      source = _load(config, entry, entry.get("split", "train"))
    except UserError as error:
      text = str(error).replace("data.train.NAME", f"data.train.{name}")
      raise UserError(
        f"data.train.{name}: {text} (--config.data.train.{name}"
        f"{recipe_hint(name, entry)})"
      ) from error
    weight = entry.get("weight", 1.0)
    mixture.append(MixtureEntry(source, entry.task, weight, name))
  return mixture


def load_dataset(config: Any, name: str, split: str) -> Sequence[Record]:
  """Opens a data set of `config.data.evaluation`.

  Raises:
    UserError: if it has no such name or split.
  """
  entries = config.data.evaluation
  if name not in entries:
    raise UserError(
      f'data.evaluation has no "{name}".{did_you_mean(name, entries.keys())}'
    )
  return _load(config, entries[name], split)


def _load(config: Config, entry: Any, split: str) -> Sequence[Record]:
  options = dict(entry.get("options", {}))
  return load_source(
    entry.source,
    task=entry.task,
    split=split,
    exif_orientation=config.data.exif_orientation,
    **options,
  )


def recipe_hint(name: str, entry: Any) -> str:
  """Returns how an official recipe names the folder of its files.

  Args:
    name: of the entry.
    entry: of `data.train` or `data.evaluation`.

  Returns:
    What goes behind the flag of a key; "" if the files are not a recipe's.
  """
  path = str(entry.get("options", {}).get("path"))
  if not path.endswith(f"/{name}_{{split}}.tsv"):
    return ""
  return f", or --config=FILE.py:data=FOLDER for the folder of {name}_*.tsv"


def relative_evaluation(config: Config) -> float:
  """Returns the examples of the final evaluation over those of each before.

  Returns:
    The ratio; 0.0 for a run that is only evaluated at its end.
  """
  if not config.train.eval_every:
    return 0.0
  settings = config.evaluation
  final, before = (
    sum(
      min(len(load_dataset(config, name, split)), limit)
      for name in config.data.evaluation
    )
    for split, limit in (
      (settings.split, settings.max_examples or math.inf),
      (config.train.eval_split, config.train.eval_examples),
    )
  )
  return final / before
