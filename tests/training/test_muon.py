"""Muon: which parameters it takes, and what it does to them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.checkpointing.writing import Checkpoints, restore_target
from narvl_jax.models import NARVL, model_config
from narvl_jax.models.shapes import abstract_variables
from narvl_jax.parallel import make_mesh
from narvl_jax.state.parameters import ParameterRule, flatten
from narvl_jax.state.train_state import make_first_state, state_shardings
from narvl_jax.training.optimizer import make_optimizer, matrix_axes

SETTINGS: dict[str, Any] = {
  "weight_decay": 0.0,
  "b1": 0.9,
  "b2": 0.99,
  "eps": 1e-8,
}
# Heads of width 3 and 2 layers, so that no two axes are equally long.
MODEL = {"width": 12, "mlp_width": 20, "num_heads": 4, "vocab_size": 40}


@pytest.fixture(scope="module", params=["conv", "resnet"])
def boxed(request):
  config = model_config("micro", image_encoder=request.param, **MODEL)
  return abstract_variables(NARVL(config), (32, 32), 8)["params"]


def test_matrices_are_the_kernels(boxed):
  axes = matrix_axes(boxed)
  paths = list(flatten(boxed))
  assert set(axes) == {path for path in paths if path.endswith("kernel")}
  assert len(axes) < len(paths) / 2


@pytest.mark.parametrize(
  ("path", "inputs", "outputs"),
  [
    # [layers, D, 3, H, d]: each of query, key and value is a matrix.
    ("encoder/layers/self_attn/qkv/kernel", (1,), (3, 4)),
    ("encoder/layers/self_attn/out_kernel", (1, 2), (3,)),
    ("decoder/layers/ffn/fc1_kernel", (1,), (2,)),
    ("decoder/cross_position_bias/key/kernel", (0,), (2, 3)),
    ("encoder/image_proj_kernel", (0,), (1,)),
  ],
)
def test_axes_of_matrices(boxed, path, inputs, outputs):
  assert matrix_axes(boxed)[path] == (inputs, outputs)


def test_axes_of_convolutions(boxed):
  shapes = flatten(boxed)
  for path, (inputs, outputs) in matrix_axes(boxed).items():
    if "conv" in path:
      last = len(shapes[path].names) - 1
      assert inputs == (last - 3, last - 2, last - 1)
      assert outputs == (last,)


def _updated(rules: dict[str, ParameterRule], learning_rate: float = 0.1):
  """Parameters and their change by one update."""
  key = jax.random.key(0)
  params = {
    "kernel": jax.random.normal(key, (8, 24)),
    "table": jax.random.normal(key, (8, 24)),
  }
  gradient = jax.tree.map(lambda x: jnp.sin(3 * x), params)
  named = nn.with_logical_partitioning(jnp.zeros, ("embed", "mlp"))
  axes = matrix_axes({"kernel": named((8, 24))})
  optimizer = make_optimizer(
    lambda step: learning_rate, rules, clip_norm=0.0, matrices=axes, **SETTINGS
  )
  change: Any
  change, _ = optimizer.update(gradient, optimizer.init(params), params)
  return gradient, change


def test_a_matrix_moves_equally_far_in_every_direction():
  rules = {"kernel": ParameterRule(), "table": ParameterRule()}
  gradient, change = _updated(rules)
  values = np.linalg.svd(change["kernel"], compute_uv=False)
  # lr * 0.2 * sqrt(larger side), as the iteration orthogonalises: to 0.7-1.2.
  step = 0.1 * 0.2 * np.sqrt(24)
  assert (values > 0.6 * step).all()
  assert (values < 1.3 * step).all()
  spread = np.linalg.svd(gradient["kernel"], compute_uv=False)
  assert spread.max() / spread.min() > 1.5 * values.max() / values.min()
  # Downhill.
  assert jnp.vdot(change["kernel"], gradient["kernel"]) < 0


def test_the_rest_is_left_to_adam():
  rules = {"kernel": ParameterRule(), "table": ParameterRule(lr=0.5)}
  gradient, change = _updated(rules)
  # The first step of Adam is the sign; with Nesterov's look ahead a bit more.
  size = np.abs(change["table"])
  np.testing.assert_allclose(size, size.mean(), rtol=1e-3)
  assert 0.05 <= size.mean() < 0.1
  assert (np.sign(change["table"]) == -np.sign(gradient["table"])).all()


def test_its_state_comes_back_from_a_checkpoint(tmp_path):
  config = model_config("micro", image_encoder="conv", **MODEL)
  boxed = abstract_variables(NARVL(config), (16, 16), 8)
  rules = {path: ParameterRule() for path in flatten(boxed["params"])}
  optimizer = make_optimizer(
    lambda step: 0.1,
    rules,
    clip_norm=1.0,
    matrices=matrix_axes(boxed["params"]),
    **SETTINGS,
  )
  first_state = make_first_state(optimizer, rules, ema=False)
  abstract = jax.eval_shape(first_state, nn.meta.unbox(boxed))
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract
  )
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(3, state)
    checkpoints.wait()
    target = restore_target(
      abstract, state_shardings(abstract, boxed, make_mesh(1))
    )
    read = checkpoints.restore(3, target)
  assert jax.tree.structure(read) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)
