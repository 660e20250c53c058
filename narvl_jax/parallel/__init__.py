"""The device mesh, and the placement of parameters and batches on it."""

from narvl_jax.parallel.batches import (
  local_rows,
  local_values,
  shard_batch,
)
from narvl_jax.parallel.mesh import (
  AXES,
  BATCH_AXES,
  VOCAB_AXIS,
  WIDTH_AXIS,
  data_parallel_size,
  make_mesh,
  mesh_from_config,
)
from narvl_jax.parallel.placement import place
from narvl_jax.parallel.rules import DEFAULT_RULES, activation_rules
from narvl_jax.parallel.sharding import (
  batch_sharding,
  check_batch_size,
  fitting_sharding,
  replicated,
  sharding_table,
  tree_shardings,
)

__all__ = [
  "AXES",
  "BATCH_AXES",
  "DEFAULT_RULES",
  "VOCAB_AXIS",
  "WIDTH_AXIS",
  "activation_rules",
  "batch_sharding",
  "check_batch_size",
  "data_parallel_size",
  "fitting_sharding",
  "local_rows",
  "local_values",
  "make_mesh",
  "mesh_from_config",
  "place",
  "replicated",
  "shard_batch",
  "sharding_table",
  "tree_shardings",
]
