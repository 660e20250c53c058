"""The same training on every mesh, with and without micro-batches."""

import numpy as np
import pytest

from tests.support import runs

STEPS = 20
# The axes one by one, over two processes: test_processes.py.
ALL_AXES = (2, 2, 2)


def _assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
  # The comparison means something: the loss has moved.
  assert expected[-1] < 0.9 * expected[0]
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
  return runs.losses(runs.setup(), STEPS)


@pytest.mark.parametrize(
  ("shape", "split"),
  [((8, 1, 1), 1), ((1, 8, 1), 8), ((1, 1, 8), 8), (ALL_AXES, 4)],
)
def test_parameters_are_split_not_only_the_batch(shape, split):
  run = runs.setup(shape)
  table = run.shardings.params["embed_tokens"]
  rows, width = run.abstract_state.params["embed_tokens"].shape
  shard = table.shard_shape((rows, width))
  assert shard[0] * shard[1] * split == rows * width


def test_a_mesh_gives_the_losses_of_one_device(one_device):
  _assert_equal(runs.losses(runs.setup(ALL_AXES), STEPS), one_device)


def test_micro_batches_give_the_losses_of_the_whole(one_device):
  run = runs.setup(train__accumulation_steps=4)
  valid = runs.host_batch(0)["valid"].reshape(-1, 4)
  assert len({*valid.sum(0).tolist()}) > 1, "equal micro-batches prove little"
  _assert_equal(runs.losses(run, STEPS), one_device)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("average", "shape"), [("examples", ALL_AXES), ("labels", (2, 1, 1))]
)
def test_autoregressive_twin(average, shape):
  """Micro-batches whose labels differ in number, on a mesh."""
  settings = {
    "model__decoder": "autoregressive",
    "loss__label_smoothing": 0.1,
    "loss__average": average,
  }
  expected = runs.losses(runs.setup(**settings), STEPS)
  run = runs.setup(shape, train__accumulation_steps=2, **settings)
  assert run.experiment.prompted[1]
  assert not run.experiment.prompted[2]
  _assert_equal(runs.losses(run, STEPS), expected)


@pytest.mark.slow
def test_residual_trunk():
  settings = {
    "model__image_encoder": "resnet",
    "model__resnet_blocks": (1, 2, 1),
    "model__resnet_width": 8,
  }
  expected = runs.losses(runs.setup(**settings), STEPS)
  _assert_equal(runs.losses(runs.setup(ALL_AXES, **settings), STEPS), expected)
