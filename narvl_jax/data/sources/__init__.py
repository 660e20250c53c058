"""Where records come from: `load_source` by name."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from narvl_jax.data.example import Record
from narvl_jax.errors import UserError, did_you_mean

# name: module and class; imported when first asked for.
SOURCES = {
  "shapes": ("narvl_jax.data.sources.shapes", "ShapesSource"),
  "easy_vqa": ("narvl_jax.data.sources.easy_vqa", "EasyVQASource"),
}


def load_source(
  name: str, *, task: str, split: str, seed: int = 0, **options: Any
) -> Sequence[Record]:
  """Opens a source of records for one task.

  Args:
    name: one of `SOURCES`.
    task: one of `narvl_jax.data.example.TASKS` that the source supports.
    split: such as "train", "validation" or "test".
    seed: for procedural sources; fixed data sets ignore it.
    **options: keyword arguments of the source's class.

  Returns:
    A sequence of `Record`s with random access. Its `texts(limit)` yields
    prompts, premises and answers for training a tokenizer.

  Raises:
    UserError: unknown source, task, split or option.
  """
  if name not in SOURCES:
    raise UserError(
      f'Unknown source "{name}".{did_you_mean(name, SOURCES)} '
      "Set data.train.NAME.source."
    )
  module, attribute = SOURCES[name]
  source = getattr(importlib.import_module(module), attribute)
  known = set(inspect.signature(source).parameters) - {"task", "split", "seed"}
  for option in options:
    if option not in known:
      raise UserError(
        f'{name}: unknown option "{option}".{did_you_mean(option, known)} '
        "Set data.train.NAME.options."
      )
  return source(task=task, split=split, seed=seed, **options)
