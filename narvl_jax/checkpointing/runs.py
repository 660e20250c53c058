"""Loads what a run folder contains: its experiment and its weights."""

import os
import sys
from typing import Any

import jax
from flax.linen import meta

from narvl_jax.checkpointing.chosen import read_chosen
from narvl_jax.checkpointing.record_checks import check_config, check_vocabulary
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.experiment.config import Config
from narvl_jax.experiment.config_checks import check_fit
from narvl_jax.experiment.datasets import DataSets
from narvl_jax.experiment.experiment import Experiment, build
from narvl_jax.experiment.vocabulary import VOCABULARY_FOLDER, make_vocabulary
from narvl_jax.files.stores import as_path
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.state.parameters import assign_rules, flatten, split_frozen
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import escape, show


def build_in(
  config: Config,
  workdir: str | os.PathLike[str],
  datasets: DataSets | None = None,
) -> Experiment:
  """Builds the experiment of an existing or a new run.

  An existing run has its own vocabulary, so resuming does not need the files
  of the vocabulary.

  Args:
    config: validated.
    datasets: opened data sets of the config, if any.

  Raises:
    UserError: the vocabulary, or a file that the config names, is invalid.
  """
  folder = as_path(workdir)
  if workdir_lib.is_run(folder):
    vocabulary = Vocabulary.load(folder / VOCABULARY_FOLDER)
  else:
    vocabulary = make_vocabulary(config, datasets)
  return build(config, vocabulary, datasets=datasets)


def open_run(workdir: str | os.PathLike[str]) -> Experiment:
  """Returns the experiment of a run, without its weights.

  Raises:
    UserError: there is no run, or its files are damaged.
  """
  folder = as_path(workdir)
  config = workdir_lib.read_config(folder)
  check_fit(config)
  return build_in(config, folder)


def load_run(
  workdir: str | os.PathLike[str],
  checkpoint: str | int = "best",
  *,
  sharding: jax.sharding.Sharding | None = None,
) -> tuple[Experiment, dict[str, Any], int]:
  """Loads a trained experiment.

  Args:
    checkpoint: "best" (by the evaluations during training), "last", or a
      step.
    sharding: sharding of every variable; None: the first device.

  Returns:
    The experiment, its variables (moving averages if the run has them), and
    the step of the checkpoint.

  Raises:
    UserError: there is no run or no such checkpoint.
  """
  folder = as_path(workdir)
  config = workdir_lib.read_config(folder)

  def read(
    checkpoints: Checkpoints, step: int
  ) -> tuple[Experiment, dict[str, Any], int]:
    record = checkpoints.read_record(step)
    notes = check_config(folder, config, record)
    check_fit(config)
    experiment = build_in(config, folder)
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
  shapes, ema = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    (shapes, ema),
  )
  return checkpoints.restore_variables(step, shapes, ema)
