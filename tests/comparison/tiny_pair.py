"""Run folders of a tiny parallel model and its autoregressive twin."""

import atexit
import copy
import functools
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
from flax.linen import meta

from narvl_jax.checkpointing.runs import build_in
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.experiment.vocabulary import VOCABULARY_FOLDER
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.state.train_state import TrainState
from tests.evaluation import tiny_run


def parallel_run() -> pathlib.Path:
  """Returns the run folder of the parallel model; do not write into it."""
  return tiny_run.tiny_run()


@functools.cache
def autoregressive_run() -> pathlib.Path:
  """Returns that of the twin, untrained as well; do not write into it."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="narvl_jax_tiny_twin"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  config: Any = copy.deepcopy(tiny_run.tiny_config())
  config.model.decoder = "autoregressive"
  name = VOCABULARY_FOLDER
  shutil.copytree(parallel_run() / name, folder / name)
  workdir_lib.write_config(folder, config)
  experiment = build_in(config, folder)
  shapes = meta.unbox(experiment.abstract_variables())
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
    shapes["params"],
  )
  state = TrainState(
    step=jax.device_put(np.int32(tiny_run.STEP)),
    params=params,
    batch_stats={},
    opt_state={"count": np.int32(tiny_run.STEP)},
    ema=None,
  )
  with Checkpoints(folder, keep_last=1) as checkpoints:
    checkpoints.save(tiny_run.STEP, state, score=0.5)
  return folder
