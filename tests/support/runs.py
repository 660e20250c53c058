"""A small version of the real model on any mesh, for tests of sharding."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from narvl_jax.experiment.experiment import Experiment
from narvl_jax.models import make_model, model_config
from narvl_jax.parallel import make_mesh, shard_batch
from narvl_jax.training.setup import Setup, build_setup
from tests.support.tiny import tiny_config

ROWS, TEXT, LABELS, QUERIES, VOCAB = 16, 6, 4, 6, 120
SIDE = 32


@functools.cache
def setup(shape: tuple[int, int, int] = (1, 1, 1), **settings: Any) -> Setup:
  """Returns a run on a mesh of that shape.

  Args:
    shape: (data, fsdp, tensor).
    **settings: config values; double underscores stand for dots.
  """
  config = tiny_config()
  config.data.update(
    {
      "image_size": (SIDE, SIDE),
      "max_text_length": TEXT,
      "max_label_length": LABELS,
    }
  )
  config.model.update(
    {
      "width": 64,
      "mlp_width": 32,
      "num_heads": 8,
      "num_queries": QUERIES,
      "encoder_layers": 2,
      "decoder_layers": 2,
      "max_text_positions": 16,
      "image_encoder": "conv",
      "patch_size": 8,
      "resnet_blocks": (1, 1, 1),
      "resnet_width": 8,
      "dtype": "float32",
    }
  )
  config.train.update({"batch_size": ROWS, "steps": 50})
  config.optimizer.update(
    {
      "learning_rate": 1e-3,
      "schedule": "constant",
      "warmup_steps": 0,
      "ema_decay": 0.0,
    }
  )
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in settings.items()}
  )
  overrides = {
    name: value
    for name, value in config.model.items()
    if name not in ("size", "dtype") and value is not None
  }
  # An autoregressive model has no class for blank, the last id.
  classes = VOCAB - int(config.model.decoder == "autoregressive")
  architecture = model_config(
    config.model.size, vocab_size=classes, pad_id=1, **overrides
  )
  vocabulary: Any = SimpleNamespace(
    blank_id=VOCAB - 1, size=VOCAB, pad_id=1, eos_id=2
  )
  experiment = Experiment(
    config, vocabulary, {}, architecture, make_model(architecture)
  )
  return build_setup(experiment, make_mesh(*shape))


@functools.cache
def host_batch(index: int) -> dict[str, np.ndarray]:
  """Returns random rows with targets of different lengths."""
  rng = np.random.default_rng(index)
  return {
    "image": rng.integers(0, 256, (ROWS, SIDE, SIDE, 3), dtype=np.uint8),
    "image_mask": rng.random(ROWS) < 0.8,
    "text": rng.integers(2, VOCAB - 1, (ROWS, TEXT), dtype=np.int32),
    "labels": rng.integers(2, VOCAB - 1, (ROWS, LABELS), dtype=np.int32),
    "label_length": rng.integers(1, LABELS + 1, ROWS, dtype=np.int32),
    "confidence": rng.uniform(0.2, 1.0, ROWS).astype(np.float32),
    "task": rng.integers(1, 3, ROWS, dtype=np.int32),
    # As many in a row would be in one micro-batch if it took rows as they come.
    "valid": rng.random(ROWS) < np.linspace(0.2, 1.0, ROWS),
  }


def losses(run: Setup, steps: int) -> np.ndarray:
  """Trains on `host_batch(0)`, `host_batch(1)`, ...: float64 [steps]."""
  with jax.set_mesh(run.mesh):
    step = functools.partial(run.compile_step(), run.read_inputs())
  state = run.init(jax.random.key(0))
  found = []
  for index in range(steps):
    state, metrics = step(state, shard_batch(host_batch(index), run.mesh))
    found.append(metrics["loss"])
  return np.array(jax.device_get(found), np.float64)
