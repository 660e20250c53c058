"""An experiment: config, vocabulary, tasks and model that belong together."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from narvl_jax.data.batches.batching import Batcher
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.tasks import Task, make_task
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.experiment.config import Config
from narvl_jax.experiment.datasets import DataSets
from narvl_jax.models import (
  EncoderDecoder,
  ModelConfig,
  make_model,
  model_config,
)
from narvl_jax.models.autoregressive import check_decoder_length
from narvl_jax.models.shapes import abstract_variables


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The objects that training, evaluation and prediction share.

  Attributes:
    model_config: the resolved architecture.
    datasets: opened data sets; None: each use opens them again.
  """

  config: Config
  vocabulary: Vocabulary
  tasks: dict[str, Task[Any]]
  model_config: ModelConfig
  model: EncoderDecoder
  datasets: DataSets | None = None

  @property
  def autoregressive(self) -> bool:
    """Whether the model predicts token by token."""
    return is_autoregressive(self.config)

  @property
  def label_length(self) -> int:
    """Most labels of a target; eos included in an autoregressive model."""
    return label_length(self.config)

  @property
  def batcher(self) -> Batcher:
    """Writes records into arrays of the shapes that the config sets."""
    data = self.config.data
    return Batcher(
      tuple(data.image_size), data.max_text_length, self.label_length
    )

  @property
  def prompted(self) -> tuple[bool, ...]:
    """Whether the decoder reads the source first, in the order of `TASKS`."""
    tasks = self.config.tasks
    return tuple(
      self.autoregressive and name in tasks and tasks[name].decoder_prompt
      for name in TASKS
    )

  @property
  def answer_positions(self) -> tuple[int, int] | None:
    """Positions that an autoregressive decoder reads, and that it predicts."""
    if not self.autoregressive:
      return None
    prompt = self.config.data.max_text_length - 1 if any(self.prompted) else 1
    return prompt + self.label_length - 1, self.label_length

  def dataset(self, name: str, split: str) -> Sequence[Record]:
    """Returns a data set of `data.evaluation`.

    Raises:
      UserError: the config has no such name or split.
    """
    datasets = self.datasets or DataSets(self.config)
    return datasets.evaluation(name, split)

  def abstract_variables(self, mesh: Mesh | None = None) -> Any:
    """Returns the shapes of the variables, boxed with logical axis names.

    Args:
      mesh: under which the variables will be initialised, so that both share
        one trace.
    """
    data = self.config.data
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
      return abstract_variables(
        self.model, tuple(data.image_size), data.max_text_length
      )


def build(
  config: Config,
  vocabulary: Vocabulary,
  *,
  datasets: DataSets | None = None,
  shapes_only: bool = False,
) -> Experiment:
  """Builds an experiment; reads and writes nothing.

  Args:
    config: validated config.
    datasets: opened data sets of the config, if any.
    shapes_only: whether to omit the tasks, which need real tokens.

  Raises:
    UserError: settings that do not fit together.
  """
  # An autoregressive model must learn where to stop.
  always = {"eos": True} if is_autoregressive(config) else {}
  tasks = {
    name: make_task(name, vocabulary, dict(settings) | always)
    for name, settings in config.tasks.items()
    if not shapes_only
  }
  architecture = resolve_model_config(config, vocabulary)
  experiment = Experiment(
    config=config,
    vocabulary=vocabulary,
    tasks=tasks,
    model_config=architecture,
    model=make_model(architecture),
    datasets=datasets or DataSets(config),
  )
  if experiment.answer_positions is not None:
    check_decoder_length(architecture, experiment.answer_positions[0])
  return experiment


def is_autoregressive(config: Config) -> bool:
  """Returns whether the model of a config predicts token by token."""
  return config.model.decoder == "autoregressive"


def label_length(config: Config) -> int:
  """Returns the largest number of labels of a target.

  `data.max_label_length`, and one more for an autoregressive model if that does
  not include eos.
  """
  without_eos = any(not task.eos for task in config.tasks.values())
  extra = is_autoregressive(config) and without_eos
  return config.data.max_label_length + int(extra)


def resolve_model_config(config: Config, vocabulary: Vocabulary) -> ModelConfig:
  """Returns the architecture: the named size and what the config overrides.

  Raises:
    UserError: settings that do not fit together.
  """
  overrides = {
    name: value
    for name, value in config.model.items()
    if name not in ("size", "dtype") and value is not None
  }
  return model_config(
    config.model.size,
    # Blank is the last id.
    vocab_size=vocabulary.size - int(is_autoregressive(config)),
    pad_id=vocabulary.pad_id,
    dtype=compute_dtype(config.model.dtype),
    **overrides,
  )


def compute_dtype(name: str) -> Any:
  """Returns the type of activations; "auto": bfloat16, on a CPU float32."""
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(name)


def relative_evaluation(experiment: Experiment) -> float:
  """Returns the examples of the final evaluation over earlier ones, or 0."""
  config = experiment.config
  if not config.train.eval_every:
    return 0.0
  settings = config.evaluation
  final, before = (
    sum(
      min(len(experiment.dataset(name, split)), limit)
      for name in config.data.evaluation
    )
    for split, limit in (
      (settings.split, settings.max_examples or math.inf),
      (config.train.eval_split, config.train.eval_examples),
    )
  )
  return final / before
