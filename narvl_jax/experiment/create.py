"""Creates an experiment from a config alone."""

from narvl_jax.experiment.config import Config
from narvl_jax.experiment.config_checks import check_fit, validate
from narvl_jax.experiment.experiment import Experiment, build
from narvl_jax.experiment.vocabulary import (
  make_vocabulary,
  placeholder_vocabulary,
)


def create(config: Config, *, shapes_only: bool = False) -> Experiment:
  """Checks a config, makes its vocabulary and builds the experiment.

  Args:
    config: see `narvl_jax.experiment.config.default_config`.
    shapes_only: without tasks, and with a vocabulary of the right size that is
      neither read nor trained (a trained one may come out smaller).

  Raises:
    UserError: the config, or something that it names, is wrong.
  """
  validate(config)
  # Before a vocabulary is trained.
  check_fit(config)
  make = placeholder_vocabulary if shapes_only else make_vocabulary
  return build(config, make(config), shapes_only=shapes_only)
