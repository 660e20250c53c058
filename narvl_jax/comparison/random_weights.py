"""Comparison of random weights of a named size: latency only."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from narvl_jax.benchmarks.workloads import Workload, make_batch, make_experiment
from narvl_jax.comparison.case import Case, Model, program_of
from narvl_jax.comparison.latency import Batch, Network
from narvl_jax.comparison.ways import AR, DEEP, NAR, choose, ways_of
from narvl_jax.data.tasks import AnswerSpace
from narvl_jax.decoding import Decoding, prepared_shapes
from narvl_jax.decoding.answers import AnswerSet
from narvl_jax.decoding.steps import Reader
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.models import SIZES
from narvl_jax.prediction.readers import make_reader, reference_decoding

# Random numbers that fill the weights repeatedly; prime, so that the rows of a
# table differ.
_NUMBERS = 1_000_003
_SCALE = 0.02


def make_case(
  size: str,
  task: str,
  load: Workload,
  *,
  beam_size: int,
  wanted: Sequence[str],
  uncached: bool,
  dtype: str = "auto",
  shapes_only: bool = False,
) -> Case:
  """Returns the case of a task; the models share tables, two the encoder.

  The third model has one decoder layer and the same number of layers; its
  encoder is deeper (Kasai et al. 2021, arXiv 2006.10369).

  Args:
    size: named size of the model.
    task: its task.
    load: sizes of the problem.
    beam_size: hypotheses of all models.
    wanted: ways to decode; all if empty.
    uncached: add greedy search without a cache.
    dtype: dtype of the activations.
    shapes_only: the variables are shapes, to compile for absent devices.

  Raises:
    UserError: the size or a way to decode is unknown, or the pictures exceed
      the position tables.
  """
  if size not in SIZES:
    raise UserError(f'--size="{size}" is unknown.{did_you_mean(size, SIZES)}')
  make = functools.partial(
    make_experiment, size, task, load, model__dtype=dtype
  )
  experiments = {NAR: make(), AR: make("autoregressive")}
  config = experiments[AR].model_config
  space, answers = _answers(experiments[AR], task, load)
  ways = choose(
    ways_of(
      space,
      "any text is an answer",
      reference_decoding(experiments[AR], task),
      beam_size=beam_size,
      uncached=uncached,
      deep=True,
    ),
    wanted,
  )
  if DEEP in {way.model for way in ways}:
    experiments[DEEP] = make(
      "autoregressive",
      model__encoder_layers=config.encoder_layers + config.decoder_layers,
      model__decoder_layers=1,
    )
  models: dict[str, Model] = {}
  for kind, experiment in experiments.items():
    encoder = "deep" if kind == DEEP else "shared"
    boxed = experiment.abstract_variables()
    if shapes_only:
      shapes = meta.unbox(boxed)
      prepared = prepared_shapes(experiment.model, shapes)
      network = Network(experiment.model, prepared)
      models[kind] = Model(encoder, network, shapes)
    else:
      shared = models[NAR].variables["params"] if models else {}
      own = {"decoder"} if kind == AR else {"decoder", "encoder"}
      weights = _weights(
        boxed, {name: x for name, x in shared.items() if name not in own}
      )
      models[kind] = Model.of(encoder, experiment.model, weights)
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
    return [make_batch(load, vocabulary.eos_id, size, i) for i in range(count)]

  return Case(task, models, ways, programs, batches, dataclasses.asdict(load))


def _weights(boxed: Any, shared: Mapping[str, Any]) -> Any:
  """Returns small random variables.

  Args:
    boxed: shapes of the variables.
    shared: parameters of another model, by the names of its modules.
  """
  rng = np.random.default_rng(0)
  numbers = _SCALE * rng.standard_normal(_NUMBERS, np.float32)
  shapes = meta.unbox(boxed)
  params = {
    name: shared[name]
    if name in shared
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
