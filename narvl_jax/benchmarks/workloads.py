"""Problems of the official models' sizes, for random weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import (
  default_config,
  evaluation_source,
  train_source,
)
from narvl_jax.experiment.create import create
from narvl_jax.experiment.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Workload:
  """Sizes of a task in the official models.

  Attributes:
    image_size: pixels a side.
    text_length: tokens of the padded source.
    queries: number of queries of the parallel model.
    answer_length: tokens of the autoregressive model before eos.
    answers: number of allowed answers; 0: any text.
    coordinates: number of bins of an answer; 0: answers are text.
    prompted: whether the autoregressive decoder reads the source first.
  """

  image_size: int
  text_length: int
  queries: int
  answer_length: int
  answers: int = 0
  coordinates: int = 0
  prompted: bool = False


# Sizes in the official scripts (reference specification, 5 and 11). Captions
# are the longest that the queries of the parallel model can express.
WORKLOADS = {
  "caption": Workload(480, 16, queries=20, answer_length=20),
  "vqa": Workload(
    480, 128, queries=6, answer_length=5, answers=3129, prompted=True
  ),
  "grounding": Workload(512, 80, queries=5, answer_length=4, coordinates=4),
  "entailment": Workload(
    480, 128, queries=3, answer_length=1, answers=3, prompted=True
  ),
}


def choose(tasks: Sequence[str], image_size: int | None) -> dict[str, Workload]:
  """Returns the workloads of some tasks, all by default.

  Raises:
    UserError: there is no such task, or the size is out of range.
  """
  for task in tasks:
    if task not in WORKLOADS:
      raise UserError(
        f'--tasks: there is no task "{task}".{did_you_mean(task, TASKS)}'
      )
  if image_size is not None and (image_size < 16 or image_size % 16):
    nearest = max(16, round(image_size / 16) * 16)
    raise UserError(
      f"--image_size={image_size} is not a multiple of 16; nearest:"
      f" --image_size={nearest}"
    )
  chosen = {task: WORKLOADS[task] for task in tasks or WORKLOADS}
  if image_size is None:
    return chosen
  return {
    task: dataclasses.replace(load, image_size=image_size)
    for task, load in chosen.items()
  }


def make_experiment(
  size: str,
  task: str,
  load: Workload,
  decoder: str = "parallel",
  **settings: Any,
) -> Experiment:
  """Returns the model of a workload, without data.

  Args:
    size: named size of the model.
    task: its task.
    load: the workload.
    decoder: "parallel" or "autoregressive".
    **settings: other values of the config, with "__" for the dots.
  """
  config: Any = default_config(task)
  # Not read, but required.
  config.data.train[task] = train_source("shapes", task)
  config.data.evaluation[task] = evaluation_source("shapes", task)
  config.model.size = size
  config.model.decoder = decoder
  config.model.num_queries = load.queries
  # As in the official checkpoints: 59,458 classes.
  config.vocabulary.source = "official"
  config.vocabulary.num_codes = 8192
  config.vocabulary.num_bins = 1000
  # The placeholder vocabulary has no words; all ids would be special.
  config.evaluation.mask_specials = False
  config.data.image_size = (load.image_size, load.image_size)
  config.data.max_text_length = load.text_length
  config.data.max_label_length = load.answer_length + 1
  config.tasks[task].decoder_prompt = load.prompted
  for name, value in settings.items():
    group, _, key = name.partition("__")
    config[group][key] = value
  return create(config, shapes_only=True)


def make_batch(
  load: Workload, eos_id: int, size: int, seed: int
) -> dict[str, np.ndarray]:
  """Returns random pictures and texts that fill their padding."""
  rng = np.random.default_rng(seed)
  side = load.image_size
  text = rng.integers(100, 50000, (size, load.text_length), np.int32)
  text[:, 0], text[:, -1] = 0, eos_id
  return {
    "image": rng.integers(0, 256, (size, side, side, 3), np.uint8),
    "text": text,
    "image_mask": np.ones(size, bool),
    "merge_repeats": np.ones(size, bool),
  }
