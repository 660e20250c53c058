"""A run folder of the autoregressive twin of the tiny run, with weights."""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from narvl_jax.checkpointing.runs import build_in
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.state.parameters import flatten
from tests.evaluation.tiny_run import tiny_config


def twin_of(
  start: pathlib.Path, target: pathlib.Path, **settings: Any
) -> dict[str, np.ndarray]:
  """Writes the folder and returns the parameters by their paths.

  Args:
    start: run folder of the tiny run; provides the vocabulary.
    target: run folder to write.
    **settings: config values; double underscores stand for dots.
  """
  config: Any = tiny_config().copy_and_resolve_references()
  config.model.decoder = "autoregressive"
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in settings.items()}
  )
  shutil.copytree(start / "vocabulary", target / "vocabulary")
  workdir_lib.write_config(target, config)
  experiment = build_in(config, target)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
    meta.unbox(experiment.abstract_variables()),
  )
  with Checkpoints(target, keep_last=1) as checkpoints:
    checkpoints.save_variables(0, {"batch_stats": {}, **variables})
  return flatten(jax.device_get(variables["params"]))
