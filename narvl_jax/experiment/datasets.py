"""Opens the data sets that a config names."""

import functools
from collections.abc import Sequence
from typing import Any

from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.example import Record
from narvl_jax.data.sources import load_source
from narvl_jax.data.sources.annotations import AnnotatedSource
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import Config


class DataSets:
  """The data sets of a config; each is opened once, when needed."""

  def __init__(self, config: Config) -> None:
    self.config = config
    self._evaluation: dict[tuple[str, str], Sequence[Record]] = {}

  @functools.cached_property
  def train(self) -> list[MixtureEntry]:
    """The sources of `data.train`; see `load_mixture`."""
    return load_mixture(self.config)

  def evaluation(self, name: str, split: str) -> Sequence[Record]:
    """Returns a data set of `data.evaluation`; see `load_dataset`."""
    key = name, split
    if key not in self._evaluation:
      self._evaluation[key] = load_dataset(self.config, name, split)
    return self._evaluation[key]


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
  """Opens a data set of `config.data.evaluation`, with its annotations.

  Raises:
    UserError: if it has no such name or split.
  """
  entries = config.data.evaluation
  if name not in entries:
    raise UserError(
      f'data.evaluation has no "{name}".{did_you_mean(name, entries.keys())}'
    )
  entry = entries[name]
  source = _load(config, entry, split)
  path = entry.get("annotations", "")
  if not path:
    return source
  path = path.replace("{split}", split)
  return AnnotatedSource(source, path, task=entry.task, split=split, name=name)


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
  """Returns advice to set the folder of an official recipe's files, or "".

  Args:
    entry: entry of `data.train` or `data.evaluation`.
  """
  path = str(entry.get("options", {}).get("path"))
  if not path.endswith(f"/{name}_{{split}}.tsv"):
    return ""
  return f", or --config=FILE.py:data=FOLDER for the folder of {name}_*.tsv"


def set_epoch(datasets: DataSets) -> None:
  """Counts the examples of an epoch where the config's steps depend on them.

  Sets `train.epoch_examples` unless it is 0. A recipe derives its numbers of
  steps from this key, so they follow, except those that were set themselves.

  Raises:
    UserError: a source does not exist.
  """
  train = datasets.config.train
  if train.epoch_examples:
    train.epoch_examples = sum(len(entry.source) for entry in datasets.train)
