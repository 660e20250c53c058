"""Exchange of weights with the official PyTorch code."""

from narvl_jax.interop.official import (
  official_from_variables,
  official_shapes,
  variables_from_official,
)

__all__ = [
  "official_from_variables",
  "official_shapes",
  "variables_from_official",
]
