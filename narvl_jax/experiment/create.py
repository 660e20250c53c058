"""Creates an experiment from a config alone."""

from narvl_jax.experiment.config import Config
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.datasets import DataSets
from narvl_jax.experiment.experiment import Experiment, build
from narvl_jax.experiment.vocabulary import (
  make_vocabulary,
  placeholder_vocabulary,
)


def create(config: Config, *, shapes_only: bool = False) -> Experiment:
  """Checks a config, makes its vocabulary and builds the experiment.

  Args:
    config: see `narvl_jax.experiment.config.default_config`.
    shapes_only: whether to omit the tasks and use a placeholder vocabulary of
      the right size (a trained one may be smaller).

  Raises:
    UserError: the config, or a file that it names, is invalid.
  """
  validate(config)
  datasets = DataSets(config)
  make = placeholder_vocabulary if shapes_only else make_vocabulary
  return build(
    config, make(config, datasets), datasets=datasets, shapes_only=shapes_only
  )
