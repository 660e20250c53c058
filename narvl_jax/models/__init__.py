"""Networks as pure functions of their parameters (flax.linen)."""

from narvl_jax.models.narvl import NARVL, project
from narvl_jax.models.sizes import SIZES, ModelConfig, model_config

__all__ = ["NARVL", "SIZES", "ModelConfig", "model_config", "project"]
