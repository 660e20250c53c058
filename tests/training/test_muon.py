"""Muon: which parameters it takes, and what it does to them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib

from narvl_jax.ahead_of_time.program import read_program
from narvl_jax.checkpointing.writing import Checkpoints, restore_target
from narvl_jax.models import NARVL, model_config
from narvl_jax.models.shapes import abstract_variables
from narvl_jax.parallel import DEFAULT_RULES, make_mesh, tree_shardings
from narvl_jax.state.parameters import ParameterRule, flatten
from narvl_jax.state.train_state import make_first_state, state_shardings
from narvl_jax.training.muon import muon
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
    ("encoder/layers/self_attn/out_kernel", (3,), (1, 2)),
    ("decoder/layers/ffn/fc1_kernel", (1,), (2,)),
    ("decoder/cross_position_bias/key/kernel", (0,), (2, 3)),
    ("encoder/image_proj_kernel", (1,), (0,)),
  ],
)
def test_axes_of_matrices(boxed, path, inputs, outputs):
  assert matrix_axes(boxed)[path] == (inputs, outputs)


def test_axes_of_convolutions(boxed):
  shapes = flatten(boxed)
  for path, (inputs, outputs) in matrix_axes(boxed).items():
    if "conv" in path:
      last = len(shapes[path].names) - 1
      assert inputs == (last,)
      assert outputs == (last - 3, last - 2, last - 1)


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


def test_matrices_are_divided_over_the_devices():
  """Equal to `optax.contrib.muon`, with an eighth of its products a device."""
  projection = ("layers", "embed", None, "heads", "head_width")
  convolution = ("conv_height", "conv_width", "conv_in", "conv_out")
  specs: Any = {
    # Eight matrices of one shape, from parameters split along either side.
    "qkv": ((1, 16, 3, 2, 12), projection),
    "out": ((2, 2, 12, 16), ("layers", "heads", "head_width", "embed")),
    "fc1": ((3, 16, 24), ("layers", "embed", "mlp")),
    # Fewer than devices.
    "conv": ((1, 1, 4, 32), convolution),
    "table": ((40, 16), ("vocab", "embed")),
  }
  boxed: Any = {
    name: nn.LogicallyPartitioned(jnp.zeros(shape), names)
    for name, (shape, names) in specs.items()
  }
  axes = matrix_axes(boxed)
  settings: Any = {"eps": 1e-8, "b1": 0.9, "b2": 0.99}
  own = muon(axes, **settings)

  def axes_of(params: Any) -> Any:
    return {name: axes.get(name) for name in params}

  plain = contrib.muon(
    -1.0,
    eps=1e-8,
    adam_b1=0.9,
    adam_b2=0.99,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=axes_of,
  )
  mesh = make_mesh(2, 4)
  used = {name for _, names in specs.values() for name in names}
  rules = [rule for rule in DEFAULT_RULES if rule[0] in used]
  shardings = tree_shardings(boxed, mesh, rules)
  rng = np.random.default_rng(0)
  gradient: Any = {
    name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for name, (shape, _) in specs.items()
  }
  state, first = plain.init(gradient), own.init(gradient)
  assert jax.tree.structure(first) == jax.tree.structure(state)
  expected: Any = plain.update(gradient, state, gradient)[0]

  def update(gradient: Any) -> Any:
    return own.update(gradient, own.init(gradient), gradient)[0]

  with jax.set_mesh(mesh):
    placed = jax.device_put(gradient, shardings)
    step = jax.jit(update, in_shardings=(shardings,), out_shardings=shardings)
    program = step.lower(placed).compile()
    changes = program(placed)
  for name, change in changes.items():
    np.testing.assert_allclose(change, expected[name], atol=1e-5, err_msg=name)
  # 5 steps of A = X X^T, A A and the product with X: one matrix a device of
  # those of 16 x 24, and of that of 4 x 32.
  one = sum(5 * (4 * a * a * b + 2 * a**3) for a, b in ((16, 24), (4, 32)))
  assert read_program(program.as_text()).flops == one


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
