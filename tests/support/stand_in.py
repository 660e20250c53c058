"""A tiny model with the interface of `NARVL` that compiles quickly.

Everything around the model is the real code.
"""

import functools
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.experiment.experiment import Experiment
from narvl_jax.models import project
from narvl_jax.parallel import make_mesh, shard_batch
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.setup import Setup, build_setup
from tests.support.tiny import tiny_config

VOCAB_SIZE = 12
NUM_QUERIES = 4
ROWS = 16


class StandIn(nn.Module):
  """Prompt and pixels through one hidden layer."""

  dropout: float = 0.0
  batch_norm: bool = False
  vocab_size: int = VOCAB_SIZE
  num_queries: int = NUM_QUERIES

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict]:
    del image_mask
    pixels = image.reshape(len(image), -1) / 255.0 - 0.5
    x = nn.Dense(8, name="image")(pixels)
    # Padding rows as in the real table.
    shape = (self.vocab_size + 4, 8)
    table = self.param("embed_tokens", nn.initializers.normal(0.3), shape)
    x += table[text].mean(1)
    if self.batch_norm:
      x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    x = nn.Dropout(self.dropout)(jnp.tanh(x), deterministic=not train)
    x = nn.Dense(self.num_queries * 8, name="head")(x)
    states = x.reshape(len(image), self.num_queries, 8)
    return project(states, table[: self.vocab_size]), {"decoder_out": states}


@functools.cache
def setup(
  devices: int = 1,
  *,
  dropout: float = 0.0,
  batch_norm: bool = False,
  frozen: str = "",
  **settings: Any,
) -> Setup:
  """Returns a run of the stand-in; compiled once for all tests.

  Args:
    devices: size of the data axis.
    dropout: of the model.
    batch_norm: of the model.
    frozen: regex of parameters to freeze.
    **settings: config values; double underscores stand for dots.
  """
  config = tiny_config()
  config.data.update(
    {"image_size": (4, 4), "max_text_length": 5, "max_label_length": 3}
  )
  config.train.update({"batch_size": ROWS, "steps": 50})
  config.optimizer.update(
    {
      "learning_rate": 0.01,
      "schedule": "constant",
      "warmup_steps": 0,
      "ema_decay": 0.0,
      # Otherwise Adam amplifies differences between gradients near zero.
      "eps": 1e-3,
    }
  )
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in settings.items()}
  )
  if frozen:
    config.optimizer.rules = ((frozen, {"freeze": True}), (".*", {}))
  # The stand-in's parameters have no axis names.
  config.mesh.rules = ()
  vocabulary: Any = SimpleNamespace(blank_id=VOCAB_SIZE - 1, size=VOCAB_SIZE)
  unused: Any = None
  model: Any = StandIn(dropout, batch_norm)
  experiment = Experiment(config, vocabulary, {}, unused, model)
  return build_setup(experiment, make_mesh(devices))


def initial_state(run: Setup, seed: int = 0) -> TrainState:
  """Returns a new state for one update, which donates it."""
  return run.init(jax.random.key(seed))


@functools.cache
def host_batch(index: int) -> dict[str, np.ndarray]:
  """Returns random rows; the lengths differ and one target does not fit."""
  rng = np.random.default_rng(index)
  labels = rng.integers(1, VOCAB_SIZE - 1, (ROWS, 3), dtype=np.int32)
  lengths = rng.integers(1, 4, ROWS, dtype=np.int32)
  # Three equal labels need five queries.
  labels[3], lengths[3] = 5, 3
  return {
    "image": rng.integers(0, 256, (ROWS, 4, 4, 3), dtype=np.uint8),
    "image_mask": np.ones(ROWS, bool),
    "text": rng.integers(0, VOCAB_SIZE, (ROWS, 5), dtype=np.int32),
    "labels": labels,
    "label_length": lengths,
    "confidence": rng.uniform(0.2, 1.0, ROWS).astype(np.float32),
    "task": rng.integers(1, 3, ROWS, dtype=np.int32),
    "valid": np.ones(ROWS, bool),
  }


def batch(run: Setup, index: int) -> dict[str, jax.Array]:
  """Returns `host_batch(index)` on the mesh of a run."""
  return shard_batch(host_batch(index), run.mesh)


def train(
  run: Setup, steps: int
) -> tuple[list[TrainState], list[dict[str, float]]]:
  """Returns the states on the host, before and after every update, and metrics.

  Args:
    run: from `setup`.
    steps: number of updates.
  """
  state = initial_state(run)
  states, metrics = [jax.device_get(state)], []
  for index in range(steps):
    state, values = run.train_step(state, batch(run, index))
    states.append(jax.device_get(state))
    metrics.append({name: float(x) for name, x in values.items()})
  return states, metrics
