"""The parts of a training run whose folder is open."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.reliability.guard import Guard
from narvl_jax.run_folder.metrics import MetricsWriter, SilentMetrics
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.setup import Setup

# Stored with a checkpoint whose evaluation was interrupted: the next start
# evaluates it first.
EVALUATION_DUE = "evaluation_due"

# (state, step) -> metrics to write, and the score of the state, if any.
Evaluate = Callable[[TrainState, int], tuple[dict[str, float], float | None]]


@dataclasses.dataclass(frozen=True)
class Run:
  """A run whose folder is open.

  Attributes:
    writer: `SilentMetrics` except on the first host.
    guard: lock, signals and time ledger of the process.
  """

  setup: Setup
  mixture: Mixture
  checkpoints: Checkpoints
  writer: MetricsWriter | SilentMetrics
  guard: Guard
  say: Callable[[str], None]

  @property
  def experiment(self) -> Experiment:
    """Config, vocabulary, tasks and model."""
    return self.setup.experiment

  @property
  def config(self) -> Any:
    """The resolved config."""
    return self.setup.experiment.config

  @property
  def workdir(self) -> pathlib.Path:
    """The run folder."""
    return self.checkpoints.workdir
