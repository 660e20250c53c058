"""A run folder of a tiny untrained model, made once for all tests."""

import atexit
import functools
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
from flax.linen import meta

from narvl_jax.checkpointing.runs import build_in, load_run
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.example import TASKS
from narvl_jax.data.sources import load_source
from narvl_jax.data.tasks import vocabulary_texts
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.experiment.config import (
  default_config,
  evaluation_source,
  train_source,
)
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.experiment.vocabulary import VOCABULARY_FOLDER
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.state.train_state import TrainState

STEP = 7
MODEL = {
  "width": 32,
  "mlp_width": 32,
  "num_heads": 2,
  "encoder_layers": 1,
  "decoder_layers": 1,
  "num_queries": 8,
  "image_encoder": "conv",
  "patch_size": 8,
  "max_text_positions": 64,
}


@functools.cache
def tiny_config() -> Any:
  """Returns a config of all four tasks; do not change it."""
  config: Any = default_config(*TASKS)
  config.model.update(MODEL)
  config.vocabulary.update({"size": 330, "num_bins": 16})
  config.data.update(
    {"image_size": (32, 32), "max_text_length": 40, "num_threads": 1}
  )
  config.evaluation.batch_size = 16
  for task in TASKS:
    config.data.train[task] = train_source("shapes", task, image_size=32)
    config.data.evaluation[task] = evaluation_source(
      "shapes", task, image_size=32
    )
  return config


@functools.cache
def tiny_run() -> pathlib.Path:
  """Returns the run folder, with a checkpoint; do not write into it."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="narvl_jax_tiny_run"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  config = tiny_config()
  workdir_lib.write_config(folder, config)
  _vocabulary(config).save(folder / VOCABULARY_FOLDER)
  experiment = build_in(config, folder)
  shapes = meta.unbox(experiment.abstract_variables())
  params = _random(shapes["params"])
  state = TrainState(
    step=jax.device_put(np.int32(STEP)),
    params=params,
    batch_stats={},
    opt_state={"count": np.int32(STEP)},
    ema=None,
  )
  with Checkpoints(folder, keep_last=1) as checkpoints:
    checkpoints.save(STEP, state, score=0.5)
  return folder


@functools.cache
def tiny_model() -> tuple[Experiment, Any]:
  """Returns the experiment and its variables."""
  experiment, variables, _ = load_run(tiny_run())
  return experiment, variables


def copy_run(target: pathlib.Path) -> pathlib.Path:
  """Returns a copy of the run folder that may be written into."""
  shutil.copytree(tiny_run(), target)
  return target


def _vocabulary(config: Any) -> Vocabulary:
  """Trains on a few records; `experiment.build` would draw thousands."""
  texts = []
  for task, entry in config.data.train.items():
    source = load_source(entry.source, task=task, split="train")
    records = [source[i] for i in range(64)]
    texts += vocabulary_texts(task, {}, records)
  settings = config.vocabulary
  return Vocabulary.train(texts, settings.size, num_bins=settings.num_bins)


def _random(shapes: Any) -> Any:
  """Fills parameters so that answers differ from request to request."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes
  )
