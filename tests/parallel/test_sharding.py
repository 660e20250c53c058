"""Where parameters and batches lie."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from narvl_jax.errors import UserError
from narvl_jax.parallel import (
  batch_sharding,
  check_batch_size,
  make_mesh,
  replicated,
  shard_batch,
  tree_shardings,
)


def test_batches_are_split_along_their_first_axis():
  mesh = make_mesh(4)
  batch = shard_batch({"x": np.arange(24).reshape(8, 3)}, mesh)
  assert batch["x"].sharding == batch_sharding(mesh)
  for i, shard in enumerate(batch["x"].addressable_shards):
    np.testing.assert_array_equal(
      shard.data, np.arange(24).reshape(8, 3)[2 * i : 2 * i + 2]
    )


def test_parameters_are_replicated_unless_a_rule_splits_them():
  def init() -> dict[str, Any]:
    split = nn.with_logical_partitioning(jnp.zeros, ("batch", "embed"))
    whole = nn.with_logical_partitioning(jnp.zeros, ("vocab", "embed"))
    return {
      "split": split((8, 4)),
      "whole": whole((8, 4)),
      "plain": jnp.zeros(()),
    }

  mesh = make_mesh()
  shardings = tree_shardings(jax.eval_shape(init), mesh)
  assert shardings["split"].spec == PartitionSpec(("data", "fsdp"), None)
  assert shardings["split"].shard_shape((8, 4)) == (1, 4)
  assert shardings["whole"].is_fully_replicated
  assert shardings["plain"] == replicated(mesh)


@pytest.mark.parametrize(
  ("batch_size", "devices", "steps"), [(8, 8, 1), (16, 8, 2), (6, 2, 3)]
)
def test_batches_that_divide(batch_size, devices, steps):
  check_batch_size(batch_size, make_mesh(devices), accumulation_steps=steps)


@pytest.mark.parametrize(
  ("batch_size", "steps", "message"),
  [
    (12, 1, r"=12 is not divisible by 8 device\(s\); .*: 8 or 16: .*size=8$"),
    (7, 1, r"train.batch_size=7 .*nearest valid: 8: .*batch_size=8$"),
    (0, 1, r"train.batch_size=0 .*nearest valid: 8: .*batch_size=8$"),
    (
      24,
      2,
      r"8 device\(s\) x 2 accumulation steps; .*: 16 or 32: .*size=16$",
    ),
    (8, 0, r"accumulation_steps=0 is below 1: .*accumulation_steps=1$"),
  ],
)
def test_batches_that_do_not_divide(batch_size, steps, message):
  with pytest.raises(UserError, match=message):
    check_batch_size(batch_size, make_mesh(), accumulation_steps=steps)
