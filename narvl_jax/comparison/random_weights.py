"""Comparison of random weights of a named size: latency only."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from narvl_jax.comparison.case import Case, Model, program_of
from narvl_jax.comparison.latency import Batch
from narvl_jax.comparison.ways import AR, NAR, choose, ways_of
from narvl_jax.data.example import TASKS
from narvl_jax.data.tasks import AnswerSpace
from narvl_jax.decoding import Decoding
from narvl_jax.decoding.answers import AnswerSet
from narvl_jax.decoding.steps import Reader
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import (
  default_config,
  evaluation_source,
  train_source,
)
from narvl_jax.experiment.create import create
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.models import SIZES
from narvl_jax.prediction.readers import make_reader, reference_decoding

# Random numbers that fill the weights repeatedly; prime, so that the rows of a
# table differ.
_NUMBERS = 1_000_003
_SCALE = 0.02


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


def workloads(
  tasks: Sequence[str], image_size: int | None
) -> dict[str, Workload]:
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


def make_case(
  size: str,
  task: str,
  load: Workload,
  *,
  beam_size: int,
  wanted: Sequence[str],
  uncached: bool,
) -> Case:
  """Returns the case of a task; both models share encoder and table.

  Raises:
    UserError: the size or a way to decode is unknown, or the pictures exceed
      the position tables.
  """
  if size not in SIZES:
    raise UserError(f'--size="{size}" is unknown.{did_you_mean(size, SIZES)}')
  experiments = {
    NAR: _experiment(size, task, load, "parallel"),
    AR: _experiment(size, task, load, "autoregressive"),
  }
  weights = {NAR: _weights(experiments[NAR].abstract_variables())}
  weights[AR] = _weights(
    experiments[AR].abstract_variables(), like=weights[NAR]
  )
  models = {
    kind: Model.of("shared", experiment.model, weights[kind])
    for kind, experiment in experiments.items()
  }
  space, answers = _answers(experiments[AR], task, load)
  ways = choose(
    ways_of(
      space,
      "any text is an answer",
      reference_decoding(experiments[AR], task),
      beam_size=beam_size,
      uncached=uncached,
    ),
    wanted,
  )
  programs = {
    way.label: program_of(
      models[way.model],
      way.label,
      _reader(experiments[way.model], task, way.decoding, load, answers),
      _lengths(way.decoding, load),
    )
    for way in ways
    if way.decoding is not None
  }
  vocabulary = experiments[AR].vocabulary

  def batches(size: int, count: int) -> list[Batch]:
    return [_batch(load, vocabulary.eos_id, size, i) for i in range(count)]

  return Case(task, models, ways, programs, batches, dataclasses.asdict(load))


def _experiment(
  size: str, task: str, load: Workload, decoder: str
) -> Experiment:
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
  return create(config, shapes_only=True)


def _weights(boxed: Any, like: Any = None) -> Any:
  """Returns small random variables.

  Args:
    boxed: shapes of the variables.
    like: variables of the other model, whose encoder and table are shared.
  """
  rng = np.random.default_rng(0)
  numbers = _SCALE * rng.standard_normal(_NUMBERS, np.float32)
  shapes = meta.unbox(boxed)
  shared = like["params"] if like else {}
  params = {
    name: shared[name]
    if name in shared and name != "decoder"
    else jax.tree.map(
      lambda leaf: jnp.asarray(np.resize(numbers, leaf.shape), leaf.dtype), tree
    )
    for name, tree in shapes["params"].items()
  }
  # Variances must not be negative.
  rest = {
    name: jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), tree)
    for name, tree in shapes.items()
    if name != "params"
  }
  return {**rest, "params": params}


def _answers(
  experiment: Experiment, task: str, load: Workload
) -> tuple[AnswerSpace | None, AnswerSet | None]:
  """Returns the allowed answers: a random list of its size, or bins."""
  vocabulary = experiment.vocabulary
  if load.coordinates:
    first = vocabulary.bin_start
    tokens = tuple(range(first, first + vocabulary.num_bins))
    count = load.coordinates
    return AnswerSpace(tokens=tokens, count=count), AnswerSet(
      task, tokens=tokens, count=count
    )
  if not load.answers:
    return None, None
  rng = np.random.default_rng(0)
  found: set[tuple[int, ...]] = set()
  while len(found) < load.answers:
    length = rng.integers(1, load.answer_length + 1)
    # Neighbours differ, because a repeat would need one more query.
    ids = rng.choice(np.arange(100, vocabulary.bin_start), length, False)
    found.add(tuple(ids.tolist()))
  sequences = tuple(sorted(found))
  return AnswerSpace(sequences), AnswerSet(task, sequences)


def _reader(
  experiment: Experiment,
  task: str,
  decoding: Decoding,
  load: Workload,
  answers: AnswerSet | None,
) -> Reader:
  """Like `make_reader`, for a task without settings."""
  free: Any = make_reader(experiment, task, Decoding())
  own = dataclasses.replace(decoding, min_length=0, max_length=0)
  if not decoding.constrained:
    answers = None
  if answers is not None and not experiment.autoregressive:
    own = decoding
    if len(answers.tokens) or load.answer_length < load.queries:
      then = (experiment.vocabulary.eos_id,)
      answers = dataclasses.replace(answers, then=then)
  return dataclasses.replace(free, decoding=own, answers=answers)


def _lengths(decoding: Decoding, load: Workload) -> np.ndarray:
  """Returns bounds that make random weights emit the task's length."""
  least = 0 if decoding.constrained else load.answer_length
  return np.asarray([least, load.answer_length], np.int32)


def _batch(load: Workload, eos_id: int, size: int, seed: int) -> Batch:
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
