"""What is known of a run before an array exists: no test compiles here."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from narvl_jax.errors import UserError
from narvl_jax.models import NARVL, encoder, model_config
from narvl_jax.models.shapes import abstract_variables
from narvl_jax.parallel import make_mesh, replicated
from narvl_jax.state.parameters import ParameterRule
from narvl_jax.state.train_state import (
  TrainState,
  bytes_per_device,
  evaluation_variables,
  state_shardings,
)
from narvl_jax.training.setup import describe_parallelism
from tests.support import runs, stand_in


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
  """Grows by one entry whenever the encoder is traced."""
  found: list[Any] = []
  monkeypatch.setattr(
    encoder, "check_image_size", lambda *size: found.append(size)
  )
  return found


def test_shapes_of_equal_models_are_traced_once(traces: list[Any]):
  one, other = (
    NARVL(model_config("micro", vocab_size=90, num_queries=3)) for _ in "ab"
  )
  assert one is not other
  shapes = abstract_variables(one, (32, 32), 8)
  assert abstract_variables(other, (32, 32), 8) == shapes
  assert len(traces) == 1
  abstract_variables(other, (32, 32), 9)
  assert len(traces) == 2


def test_a_start_traces_the_model_once_to_initialise_and_once_to_train(
  traces: list[Any],
):
  # A model that no other test builds, so that nothing is cached.
  setup = runs.setup((2, 1, 1), model__num_queries=5, model__mlp_width=24)
  with jax.set_mesh(setup.mesh):
    setup.sharding_table()
    setup.init.trace(jax.random.key(0))
    assert len(traces) == 1
    setup.trace_step()
  assert len(traces) == 2


def test_state_has_the_sharding_of_its_parameters():
  def variables() -> dict:
    split = nn.with_logical_partitioning(jnp.zeros, ("embed", None))
    return {
      "params": {"a": {"kernel": split((8, 4)), "bias": jnp.zeros(4)}},
      "batch_stats": {"a": {"mean": jnp.zeros(4)}},
    }

  boxed = jax.eval_shape(variables)
  params = nn.meta.unbox(boxed)["params"]
  stats = nn.meta.unbox(boxed)["batch_stats"]
  scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
  abstract = TrainState(
    step=scalar,
    params=params,
    batch_stats=stats,
    opt_state=({"mu": params, "count": scalar},),
    ema={"params": params, "batch_stats": stats},
  )
  mesh = make_mesh()
  shardings = state_shardings(abstract, boxed, mesh, [("embed", "data")])
  split = PartitionSpec("data", None)
  assert shardings.ema is not None
  for tree in (
    shardings.params,
    shardings.opt_state[0]["mu"],
    shardings.ema["params"],
  ):
    assert tree["a"]["kernel"].spec == split
    assert tree["a"]["bias"].is_fully_replicated
  assert shardings.step == replicated(mesh)
  assert shardings.opt_state[0]["count"] == replicated(mesh)
  assert shardings.batch_stats["a"]["mean"] == replicated(mesh)
  # Three kernels in eight parts, three biases, two means, two counters.
  expected = 4 * (3 * 32 / 8 + 3 * 4 + 2 * 4 + 2)
  assert bytes_per_device(abstract, shardings) == expected


def test_numbers_of_a_run():
  run = stand_in.setup()
  parameters = {
    "image": 4 * 4 * 3 * 8 + 8,
    "embed_tokens": 16 * 8,
    "head": 8 * 4 * 8 + 4 * 8,
  }
  assert run.num_parameters == sum(parameters.values())
  assert run.num_frozen == 0
  # Parameters and two moments, and the counters of optimizer and state.
  scalars = [x for x in jax.tree.leaves(run.abstract_state) if not x.ndim]
  bytes_of_scalars = 4 * len(scalars)
  assert run.state_bytes_per_device == (
    3 * 4 * run.num_parameters + bytes_of_scalars
  )


def test_parameter_table():
  run = stand_in.setup(frozen="embed_tokens")
  assert run.num_frozen == 128
  rows = run.parameter_table().splitlines()
  assert rows[0].split() == ["parameter", "shape", "count", "lr", "decay"]
  cells = {row.split()[0]: row.split()[1:] for row in rows[1:]}
  assert cells["embed_tokens"] == ["16x8", "128", "frozen", "-"]
  assert cells["head/kernel"] == ["8x32", "256", "1", "1"]
  assert len(cells) == 5


def test_split_of_a_batch():
  assert describe_parallelism(stand_in.setup()) == "batch 16"
  run = stand_in.setup(4, train__accumulation_steps=2)
  assert describe_parallelism(run) == "batch 16 = 4 x 2 x 2 accumulation steps"


def test_shapes_of_a_batch():
  run = stand_in.setup()
  batch = stand_in.host_batch(0)
  assert run.batch.keys() == batch.keys()
  for name, spec in run.batch.items():
    assert (spec.shape, spec.dtype) == (batch[name].shape, batch[name].dtype)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"train__batch_size": 12}, r"train.batch_size=12 .*: 8 or 16"),
    (
      {"train__accumulation_steps": 3},
      r"=16 is not divisible by 8 device\(s\) x 3 accumulation steps; .* 24",
    ),
    ({"frozen": "embed_token"}, r'is never used: .* mean "embed_tokens"'),
    ({"optimizer__schedule": "step"}, r'optimizer.schedule: "step" is unknown'),
    ({"optimizer__warmup_steps": 50}, r"warmup_steps=50 .* below train.steps"),
  ],
)
def test_mistakes(settings, message):
  with pytest.raises(UserError, match=message):
    stand_in.setup(8, **settings)


def test_averages_are_evaluated():
  params = {"a": {"kernel": 1, "bias": 2}}
  state = TrainState(
    step=jnp.int32(0),
    params=params,
    batch_stats={"a": {"mean": 3}},
    opt_state=(),
    ema=None,
  )
  assert evaluation_variables(state) == {
    "params": params,
    "batch_stats": {"a": {"mean": 3}},
  }
  averages = {
    "params": {"a": {"kernel": 10}},
    "batch_stats": {"a": {"mean": 30}},
  }
  # The bias is frozen and has no average.
  assert evaluation_variables(state.replace(ema=averages)) == {  # pyright: ignore
    "params": {"a": {"kernel": 10, "bias": 2}},
    "batch_stats": {"a": {"mean": 30}},
  }


def test_rules_are_those_of_the_config():
  run = stand_in.setup(frozen="embed_tokens")
  assert run.rules["embed_tokens"] == ParameterRule(freeze=True)
  assert run.rules["head/bias"] == ParameterRule()
