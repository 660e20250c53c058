"""Exchange of weights with the official PyTorch code."""

from narvl_jax.interop.adapt import Options
from narvl_jax.interop.conversion import convert_official, load_official
from narvl_jax.interop.export import save_official
from narvl_jax.interop.official import (
  official_from_variables,
  official_shapes,
  variables_from_official,
)

__all__ = [
  "Options",
  "convert_official",
  "load_official",
  "official_from_variables",
  "official_shapes",
  "save_official",
  "variables_from_official",
]
