"""The run of `tiny_run` with a batch at step 7 that gives NaN."""

from narvl_jax.data.batches import readers
from narvl_jax.experiment.config import Config
from tests.programs import nan_reader, tiny_run


def get_config(steps: str = "10") -> Config:
  """Returns the config and patches the reader of this process."""
  # Four of the eight rows of a batch come from each entry.
  read = nan_reader.spoiled(0, 4 * (7 - 1) + 1)
  readers.TrainReader.__call__ = read  # pyright: ignore
  config = tiny_run.get_config(steps)
  config.train.update({"eval_every": 0, "checkpoint_every": 2})
  config.evaluation.max_examples = 4
  return config
