"""Meshes, logical axis rules and batch placement."""

from narvl_jax.parallel.mesh import AXES, data_parallel_size, make_mesh
from narvl_jax.parallel.sharding import (
  RULES,
  batch_sharding,
  check_batch_size,
  replicated,
  shard_batch,
  tree_shardings,
)

__all__ = [
  "AXES",
  "RULES",
  "batch_sharding",
  "check_batch_size",
  "data_parallel_size",
  "make_mesh",
  "replicated",
  "shard_batch",
  "tree_shardings",
]
