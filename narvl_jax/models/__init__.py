"""Networks as pure functions of their parameters (flax.linen)."""

from narvl_jax.models.autoregressive import Autoregressive
from narvl_jax.models.encoder_decoder import EncoderDecoder, project
from narvl_jax.models.narvl import NARVL
from narvl_jax.models.sizes import SIZES, ModelConfig, model_config

__all__ = [
  "NARVL",
  "SIZES",
  "Autoregressive",
  "EncoderDecoder",
  "ModelConfig",
  "make_model",
  "model_config",
  "project",
]


def make_model(config: ModelConfig) -> NARVL | Autoregressive:
  """Returns the network whose decoder a config asks for."""
  if config.decoder == "autoregressive":
    return Autoregressive(config)
  return NARVL(config)
