"""A config file for runs in several processes: --config=FILE.py[:STEPS]."""

from narvl_jax.experiment.config import Config
from tests.support.tiny import tiny_config


def get_config(steps: str = "6") -> Config:
  """Returns the tiny experiment with few questions at the end."""
  config = tiny_config()
  config.train.update({"steps": int(steps), "log_every": 1})
  config.evaluation.max_examples = 12
  return config
