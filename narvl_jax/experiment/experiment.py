"""An experiment: config, vocabulary, tasks and model that belong together."""

import dataclasses
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import meta

from narvl_jax.checkpointing.chosen import read_chosen
from narvl_jax.checkpointing.recorded_config import (
  check_recorded,
  check_vocabulary,
)
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.example import TASKS
from narvl_jax.data.tasks import Task, make_task
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.experiment.config import Config
from narvl_jax.experiment.config_checks import check_fit, validate
from narvl_jax.experiment.vocabulary import (
  VOCABULARY_FOLDER,
  make_vocabulary,
  placeholder_vocabulary,
)
from narvl_jax.models import (
  EncoderDecoder,
  ModelConfig,
  make_model,
  model_config,
)
from narvl_jax.models.autoregressive import check_decoder_length
from narvl_jax.models.shapes import abstract_variables
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.state.parameters import assign_rules, flatten, split_frozen
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import escape, show


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What training, evaluation and prediction share.

  Attributes:
    config: every setting.
    vocabulary: text to ids and back.
    tasks: name -> task.
    model_config: the resolved architecture.
    model: the network.
  """

  config: Config
  vocabulary: Vocabulary
  tasks: dict[str, Task[Any]]
  model_config: ModelConfig
  model: EncoderDecoder

  @property
  def autoregressive(self) -> bool:
    """Whether the model answers token by token."""
    return is_autoregressive(self.config)

  @property
  def label_length(self) -> int:
    """Labels of a target at most, those of an autoregressive one with eos."""
    return label_length(self.config)

  @property
  def prompted(self) -> tuple[bool, ...]:
    """By the order of `TASKS`: a decoder reads the source before it answers."""
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

  def save(self, workdir: str | os.PathLike[str]) -> None:
    """Writes vocabulary and config, from which `restore` builds it again."""
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    self.vocabulary.save(folder / VOCABULARY_FOLDER)
    # Last: a folder with a config is a run.
    workdir_lib.write_config(folder, self.config)

  def abstract_variables(self) -> Any:
    """Returns the shapes of the variables, boxed with logical axis names."""
    data = self.config.data
    return abstract_variables(
      self.model, tuple(data.image_size), data.max_text_length
    )


def build(
  config: Config,
  workdir: str | os.PathLike[str] | None = None,
  *,
  shapes_only: bool = False,
) -> Experiment:
  """Builds an experiment; writes nothing (see `Experiment.save`).

  Args:
    config: checked here.
    workdir: if it has a vocabulary that one is used, so that a resumed run
      does not depend on what it was made from.
    shapes_only: without tasks, and with a vocabulary of the right size that is
      neither read nor trained (a trained one may come out smaller).

  Raises:
    UserError: the config, or something that it names, is wrong.
  """
  validate(config)
  check_fit(config)
  if shapes_only:
    vocabulary = placeholder_vocabulary(config)
  elif workdir is not None and workdir_lib.is_run(pathlib.Path(workdir)):
    vocabulary = Vocabulary.load(pathlib.Path(workdir) / VOCABULARY_FOLDER)
  else:
    vocabulary = make_vocabulary(config)
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
  )
  if experiment.answer_positions is not None:
    check_decoder_length(architecture, experiment.answer_positions[0])
  return experiment


def restore(
  workdir: str | os.PathLike[str],
  checkpoint: str | int = "best",
  *,
  sharding: jax.sharding.Sharding | None = None,
) -> tuple[Experiment, dict[str, Any], int]:
  """Reads a trained experiment.

  Args:
    workdir: folder of the run.
    checkpoint: "best" (by the evaluations during training), "last", or a
      step.
    sharding: where each variable shall lie; None: on the first device.

  Returns:
    The experiment, its variables (moving averages if the run has them), and
    the step of the checkpoint.

  Raises:
    UserError: there is no run or no such checkpoint.
  """
  folder = pathlib.Path(workdir)
  config = workdir_lib.read_config(folder)

  def read(
    checkpoints: Checkpoints, step: int
  ) -> tuple[Experiment, dict[str, Any], int]:
    record = checkpoints.read_record(step)
    notes = check_recorded(folder, config, record)
    experiment = build(config, folder)
    check_vocabulary(folder, experiment.vocabulary.fingerprint, record)
    with progress.doing(f"reading the checkpoint of {folder}"):
      variables = _read_variables(experiment, checkpoints, step, sharding)
    for note in notes:
      show(f"note: {escape(note)}", file=sys.stderr)
    return experiment, variables, step

  return read_chosen(folder, checkpoint, read)


def _read_variables(
  experiment: Experiment,
  checkpoints: Checkpoints,
  step: int,
  sharding: jax.sharding.Sharding | None,
) -> dict[str, Any]:
  """Reads the variables of an experiment, see `restore`."""
  config = experiment.config
  shapes = meta.unbox(experiment.abstract_variables())
  shapes = {"batch_stats": {}, **shapes}
  ema = None
  if config.optimizer.ema_decay:
    paths = list(flatten(shapes["params"]))
    rules = assign_rules(config.optimizer.rules, paths)
    trained, _ = split_frozen(shapes["params"], rules)
    ema = {"params": trained, "batch_stats": shapes["batch_stats"]}
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def placed(tree: Any) -> Any:
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      tree,
    )

  return checkpoints.restore_variables(
    step, placed(shapes), None if ema is None else placed(ema)
  )


def is_autoregressive(config: Config) -> bool:
  """Returns whether the model of a config answers token by token."""
  return config.model.decoder == "autoregressive"


def label_length(config: Config) -> int:
  """Returns the labels that a target may have.

  `data.max_label_length`, and one more for an autoregressive model if that
  leaves eos out.
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
  """Returns the type of activations; "auto" is bfloat16 but on a CPU."""
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(name)
