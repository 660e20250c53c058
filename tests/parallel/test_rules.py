"""Placement of parameters by rules, and invalid rules."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.linen import meta
from jax.sharding import PartitionSpec

from narvl_jax.errors import UserError
from narvl_jax.models import NARVL, model_config
from narvl_jax.models.shapes import abstract_variables
from narvl_jax.parallel import (
  DEFAULT_RULES,
  make_mesh,
  place,
  replicated,
  sharding_table,
  tree_shardings,
)
from narvl_jax.parallel.rules import check_rules
from narvl_jax.state.parameters import flatten

RULES = (("a", "tensor"), ("b", "fsdp"), ("c", "fsdp"), ("c", None))


def _mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> dict[str, int]:
  return {"data": data, "fsdp": fsdp, "tensor": tensor}


def _tree(**arrays: tuple[tuple[int, ...], tuple[str | None, ...]]) -> Any:
  def init() -> Any:
    return {
      "params": {
        name: nn.with_logical_partitioning(jnp.zeros, names)(shape)
        for name, (shape, names) in arrays.items()
      }
    }

  return jax.eval_shape(init)


def _variables(size: str) -> Any:
  return abstract_variables(NARVL(model_config(size)), (64, 64), 16)


def test_first_rule_that_applies():
  tree = _tree(
    x=((8, 6), ("a", "b")),
    taken=((6, 6), ("c", "b")),
    free=((6,), ("c",)),
    odd=((7, 8), ("c", "a")),
    unnamed=((4, 8), (None, "a")),
  )
  specs = {p.path: p.spec for p in place(tree, _mesh(1, 2, 4), RULES)}
  assert specs == {
    "params/x": (("tensor",), ("fsdp",)),
    # `b` comes first in the rules, so `c` is left whole.
    "params/taken": ((), ("fsdp",)),
    "params/free": (("fsdp",),),
    "params/odd": ((), ("tensor",)),
    "params/unnamed": ((), ("tensor",)),
  }


def test_a_placement_knows_its_parts():
  tree = _tree(x=((8, 6), ("a", "b")))
  (placement,) = place(tree, _mesh(3, 2, 4), RULES[:2])
  assert placement.partition_spec == PartitionSpec("tensor", "fsdp")
  assert placement.shard_shape(_mesh(3, 2, 4)) == (2, 3)
  assert placement.parts(_mesh(3, 2, 4)) == 8
  assert placement.bytes == 8 * 6 * 4


def test_several_mesh_axes_on_one_dimension():
  tree = _tree(x=((8, 6), ("a", None)))
  (placement,) = place(tree, _mesh(1, 2, 4), [("a", ["fsdp", "tensor"])])
  assert placement.partition_spec == PartitionSpec(("fsdp", "tensor"), None)
  assert placement.shard_shape(_mesh(1, 2, 4)) == (1, 6)


def test_shardings_of_a_tree():
  def init() -> Any:
    split = nn.with_logical_partitioning(jnp.zeros, ("a", "b"))
    return {"params": {"x": split((8, 4))}, "batch_stats": {"m": jnp.zeros(3)}}

  mesh = make_mesh(2, 2, 2)
  shardings = tree_shardings(jax.eval_shape(init), mesh, RULES[:2])
  assert shardings["params"]["x"].spec == PartitionSpec("tensor", "fsdp")
  assert shardings["params"]["x"].shard_shape((8, 4)) == (4, 2)
  assert shardings["batch_stats"]["m"].is_equivalent_to(replicated(mesh), 1)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
@pytest.mark.parametrize("shape", [(16, 16, 1), (1, 64, 1), (4, 16, 4)])
def test_official_sizes_fit_the_usual_meshes(size, shape):
  mesh_shape = _mesh(*shape)
  placements = place(_variables(size), mesh_shape, DEFAULT_RULES)
  parameters = [p for p in placements if p.path.startswith("params/")]
  whole = sum(p.bytes for p in parameters if p.parts(mesh_shape) == 1)
  assert whole < 0.01 * sum(p.bytes for p in parameters)
  table = next(p for p in parameters if p.path.endswith("embed_tokens"))
  assert table.spec == (("tensor",), ("fsdp",))


def test_every_parameter_of_the_model_names_its_axes():
  boxed = _variables("base")["params"]
  names = flatten(nn.get_partition_spec(boxed))
  for path, leaf in flatten(meta.unbox(boxed)).items():
    assert len(names[path]) == leaf.ndim, path


@pytest.mark.parametrize(
  ("arrays", "mesh", "rules", "message"),
  [
    (
      {"x": ((4, 4), ("a", "hedas"))},
      _mesh(),
      (("a", "tensor"), ("heads", None)),
      'params/x [4x4]: no rule for the axis "hedas", only for "heads".'
      ' Add ("hedas", None) to mesh.rules',
    ),
    (
      {"x": ((6, 4), ("a", None))},
      _mesh(2, 1, 4),
      RULES[:1],
      'mesh data=2 fsdp=1 tensor=4: params/x [6x4]: the rule ("a",'
      " 'tensor') splits the axis \"a\" of 6, which does not divide by"
      " tensor=4; nearest mesh that works: --config.mesh.data=4"
      " --config.mesh.fsdp=1 --config.mesh.tensor=2",
    ),
    (
      {"x": ((6, 4), ("vocab", None))},
      _mesh(1, 1, 4),
      (("vocab", "tensor"),),
      "does not divide by tensor=4 (--config.model.vocab_multiple=128 pads"
      " it); nearest mesh that works: --config.mesh.data=2",
    ),
    (
      {"x": ((4, 4), ("a", "d"))},
      _mesh(1, 1, 2),
      (("a", "tensor"), ("d", "tensor")),
      "the rule (\"d\", 'tensor') uses a mesh axis that another axis of this"
      ' array has already; add ("d", None) after it',
    ),
    (
      {"x": ((4, 4), ("a", "a"))},
      _mesh(1, 1, 2),
      RULES[:1],
      "uses a mesh axis that another axis of this array has already",
    ),
    (
      {"x": ((4,), ("a",))},
      _mesh(),
      (("a", "tensor"), ("vocabulary", "tensor")),
      "mesh.rules: (\"vocabulary\", 'tensor') is never used: no array has",
    ),
    (
      {"x": ((4, 4), ("a", None)), "y": ((99, 9), (None, "norm"))},
      _mesh(4, 1, 2),
      (("a", "tensor"), ("norm", None)),
      "98% of the parameter bytes are on every device, more than 2%; the"
      " largest is params/y [99x9] with the axes (None, norm); give one of"
      " them a rule in mesh.rules; nearest mesh that works:"
      " --config.mesh.data=8 --config.mesh.fsdp=1 --config.mesh.tensor=1",
    ),
    (
      {"x": ((4, 99), ("a", None))},
      _mesh(1, 8, 1),
      (("a", "tensor"),),
      "100% of the parameter bytes are on every device",
    ),
  ],
)
def test_rules_that_do_not_fit(arrays, mesh, rules, message):
  with pytest.raises(UserError, match=re.escape(message)):
    place(_tree(**arrays), mesh, rules)


def test_fsdp_parameters_may_be_whole_without_fsdp():
  tree = _tree(x=((8, 6), (None, "b")), y=((8,), ("a",)))
  x, _ = place(tree, _mesh(2, 1, 4), RULES[:2])
  assert x.parts(_mesh(2, 1, 4)) == 1


def test_biases_may_be_whole():
  rules = (*RULES[:1], ("norm", None), ("layers", None))
  tree = _tree(x=((3, 64), ("layers", "norm")), y=((8,), ("a",)))
  x, _ = place(tree, _mesh(1, 1, 8), rules)
  assert x.parts(_mesh(1, 1, 8)) == 1
  # A matrix of that size may not.
  tree = _tree(x=((3, 64), ("norm", "norm")), y=((8, 1), ("a", "layers")))
  with pytest.raises(UserError, match="are on every device"):
    place(tree, _mesh(1, 1, 8), rules)


def test_a_rule_that_is_always_shadowed():
  tree = _tree(x=((8, 6), ("a", "d")))
  rules = (("d", "tensor"), ("a", "tensor"), ("a", None))
  with pytest.raises(UserError, match="always in use or never divides"):
    place(tree, _mesh(1, 1, 2), rules)


@pytest.mark.parametrize(
  ("rule", "message"),
  [
    ("embed", r"mesh.rules: 'embed' is not a pair \(logical axis name"),
    (("embed",), "is not a pair"),
    ((1, "fsdp"), "is not a pair"),
    (("embed", "fdsp"), r'mesh axis "fdsp". Did you mean "fsdp"\?'),
    (("embed", ("data", "tp")), r'the mesh axis "tp"'),
    (("batch", "data"), '"batch" is always split over data and fsdp'),
  ],
)
def test_invalid_rules_are_rejected(rule, message):
  with pytest.raises(UserError, match=message):
    check_rules([rule])


@pytest.mark.parametrize("shape", [(1, 16, 1), (16, 16, 1), (4, 16, 4)])
def test_table_of_the_base_model(shape, golden):
  mesh_shape = _mesh(*shape)
  boxed = _variables("base")
  table = sharding_table(
    place(boxed, mesh_shape, DEFAULT_RULES), mesh_shape, DEFAULT_RULES
  )
  golden("sharding/base_{}x{}x{}.txt".format(*shape), table + "\n")
