"""The same training on every mesh, with and without micro-batches."""

import numpy as np
import pytest

from tests.support import runs

STEPS = 20
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
# A mesh takes long to compile for; the last one has all axes.
_MOST_ARE_SLOW = [
  *(pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES[:-1]),
  MESHES[-1],
]


def _assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
  # The comparison means something: the loss has moved.
  assert expected[-1] < 0.9 * expected[0]
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
  return runs.losses(runs.setup(), STEPS)


@pytest.mark.parametrize("shape", _MOST_ARE_SLOW)
def test_every_mesh_gives_the_losses_of_one_device(shape, one_device):
  run = runs.setup(shape)
  # Parameters are split, not only the batch.
  split = {(1, 8, 1): 8, (1, 1, 8): 8, (2, 2, 2): 4}.get(shape, 1)
  table = run.shardings.params["embed_tokens"]
  rows, width = run.abstract_state.params["embed_tokens"].shape
  shard = table.shard_shape((rows, width))
  assert shard[0] * shard[1] * split == rows * width
  _assert_equal(runs.losses(run, STEPS), one_device)


@pytest.mark.parametrize(
  ("shape", "steps"),
  [pytest.param((2, 2, 1), 2, marks=pytest.mark.slow), ((1, 1, 1), 4)],
)
def test_micro_batches_give_the_losses_of_the_whole(shape, steps, one_device):
  run = runs.setup(shape, train__accumulation_steps=steps)
  valid = runs.host_batch(0)["valid"].reshape(-1, steps)
  assert len({*valid.sum(0).tolist()}) > 1, "equal micro-batches prove little"
  _assert_equal(runs.losses(run, STEPS), one_device)


@pytest.mark.parametrize(
  "average", ["examples", pytest.param("labels", marks=pytest.mark.slow)]
)
def test_autoregressive_twin(average):
  """Micro-batches whose labels differ in number, on all axes of a mesh."""
  settings = {
    "model__decoder": "autoregressive",
    "loss__label_smoothing": 0.1,
    "loss__average": average,
  }
  expected = runs.losses(runs.setup(**settings), STEPS)
  run = runs.setup((2, 2, 2), train__accumulation_steps=2, **settings)
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
  _assert_equal(runs.losses(runs.setup((2, 2, 2), **settings), STEPS), expected)
