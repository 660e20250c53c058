"""Greedy decoding over a split vocabulary: same answers, and what moves."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from narvl_jax.ahead_of_time.program import read_program
from narvl_jax.ahead_of_time.topology import get_topology
from narvl_jax.decoding import greedy_decode
from narvl_jax.decoding.classes import never_predicted
from narvl_jax.decoding.likelihood import (
  coordinate_distributions,
  query_entropy,
)
from narvl_jax.errors import UserError
from narvl_jax.parallel import AXES as MESH_AXES
from narvl_jax.parallel import BATCH_AXES, VOCAB_AXIS, make_mesh
from narvl_jax.query_ctc import MeshAxes

AXES = MeshAxes(BATCH_AXES, VOCAB_AXIS)
MESHES = [(1, 1, 8), (2, 2, 2)]
# On 8 devices the last one has nothing but padding.
B, N, ROWS, CLASSES, PAD, BLANK = 8, 6, 256, 220, 1, 219


@functools.cache
def problem():
  """Logits, with ties within a device and across devices, and merging."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (B, N, ROWS)).astype(np.float32)
  logits[..., CLASSES:] = 80.0
  logits[0, 0, [40, 41, 200]] = 60.0
  logits[0, 1, [31, 32]] = 60.0
  logits[0, 2, [130, 2]] = 60.0
  logits[1, :, BLANK] = 50.0
  logits[2, :3, 7] = 50.0
  logits[3] -= 300.0
  # Ids that must not be said, one where it would win.
  forbidden = np.zeros(CLASSES, bool)
  forbidden[[0, 3, 150]] = True
  logits[4, :, 150] = 70.0
  return logits, np.arange(B) % 3 != 1, forbidden


def decode(logits, merge, axes, mask):
  return greedy_decode(
    logits,
    merge,
    blank_id=BLANK,
    pad_id=PAD,
    forbidden=problem()[2] if mask else None,
    vocab_size=CLASSES,
    axes=axes,
  )


@functools.cache
def compiled(shape, mask, topology=None):
  devices = None if topology is None else get_topology(topology).devices
  mesh = make_mesh(*shape, devices=devices)
  logits, merge, _ = problem()
  specs = PartitionSpec(BATCH_AXES, None, VOCAB_AXIS), PartitionSpec(BATCH_AXES)
  shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
  args = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    for x, s in zip((logits, merge), shardings, strict=True)
  ]
  with jax.set_mesh(mesh):
    step = jax.jit(functools.partial(decode, axes=AXES, mask=mask))
    return step.lower(*args).compile(), shardings


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
class TestOnEightDevices:
  @pytest.mark.parametrize("mask", [False, True])
  @pytest.mark.parametrize("shape", MESHES)
  def test_same_answers_as_on_one_device(self, shape, mask):
    step, shardings = compiled(shape, mask)
    logits, merge, _ = problem()
    found = step(*jax.device_put((logits, merge), shardings))
    cut = jnp.asarray(logits[..., :CLASSES])
    whole = jax.jit(functools.partial(decode, axes=MeshAxes(), mask=mask))
    expected = whole(cut, merge)
    np.testing.assert_array_equal(found["ids"], expected["ids"])
    np.testing.assert_array_equal(found["lengths"], expected["lengths"])
    # Numbers near -300 are spaced by 3e-5.
    np.testing.assert_allclose(
      np.exp(found["log_prob"]), np.exp(expected["log_prob"]), rtol=1e-4
    )
    # The smallest id won every tie.
    assert found["ids"][0, :3].tolist() == [40, 31, 2]
    assert found["lengths"][1] == 0
    assert np.any(found["ids"][4] == 150) == (not mask)

  @pytest.mark.parametrize("shape", MESHES)
  def test_same_distributions_as_on_one_device(self, shape):
    """Distributions of queries and coordinates; bins are on several devices."""
    mesh = make_mesh(*shape)
    logits, merge, forbidden = problem()
    never = never_predicted(ROWS, forbidden, CLASSES)
    assert never is not None
    logits = np.where(never, -np.inf, logits).astype(np.float32)
    logits[:, :4, 20:100] += 20

    def describe(logits, merge, axes):
      found = greedy_decode(
        logits, merge, blank_id=BLANK, pad_id=PAD, axes=axes
      )
      boxes = coordinate_distributions(
        logits,
        found["ids"],
        found["lengths"],
        merge,
        blank_id=BLANK,
        bins=(20, 80),
        axes=axes,
      )
      return query_entropy(logits, axes), *boxes

    specs = (
      PartitionSpec(BATCH_AXES, None, VOCAB_AXIS),
      PartitionSpec(BATCH_AXES),
    )
    places = [NamedSharding(mesh, spec) for spec in specs]
    with jax.set_mesh(mesh):
      found = jax.jit(functools.partial(describe, axes=AXES))(
        *jax.device_put((logits, merge), tuple(places))
      )
    whole = jax.jit(functools.partial(describe, axes=MeshAxes()))
    expected = whole(jnp.asarray(logits), jnp.asarray(merge))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-4, atol=1e-6)
    likely = np.asarray(expected[2]) > 1e-3
    np.testing.assert_array_equal(
      np.asarray(found[1])[likely], np.asarray(expected[1])[likely]
    )
    assert likely.any()

  @pytest.mark.parametrize("shape", MESHES)
  def test_communication_of_a_split_vocabulary(self, shape):
    step, _ = compiled(shape, True)
    program = read_program(step.as_text())
    sizes = dict(zip(MESH_AXES, shape, strict=True))
    b, parts = B // (shape[0] * shape[1]), shape[2]
    shapes = {"all-gather": [], "all-reduce": []}
    for found in program.collectives:
      # Rows of a batch need no communication.
      assert found.axes(sizes) == ("tensor",)
      shapes[found.kind] += [array.size for array in found.arrays]
    # The best class of every device and its logit.
    assert shapes["all-gather"] == [parts * b * N] * 2
    # Of the loss: logsumexp (three numbers a query) and N + 1 classes.
    assert set(shapes["all-reduce"]) == {b * N, b * N * (N + 1)}
    # Nothing but the mask of padding and forbidden ids.
    whole = {array.shape for array in program.arrays if ROWS in array.shape}
    assert whole <= {(ROWS,)}


# Programs for a TPU are cached, but without one they cannot be read again.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_communication_on_tpus():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install narvl_jax[aot]")
  step, _ = compiled((2, 1, 4), True, "v5e:2x4")
  program = read_program(step.as_text())
  sizes = {"data": 2, "fsdp": 1, "tensor": 4}
  b = B // 2
  moved = [
    array.size for found in program.collectives for array in found.arrays
  ]
  assert {found.axes(sizes) for found in program.collectives} == {("tensor",)}
  # What is gathered is of four devices; no classes but those of an answer.
  assert set(moved) <= {b * N, 4 * b * N, b * N * (N + 1)}
  assert 4 * b * N in moved
  assert b * N * (N + 1) in moved
  assert not any(
    ROWS in array.shape for array in program.arrays if array.size > ROWS
  )


def test_vocabulary_must_divide():
  mesh = AbstractMesh((1, 1, 6), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
  message = r"256 rows does not divide .* of 6.*--config.model.vocab_multiple"
  logits, merge, _ = problem()
  with (
    jax.sharding.use_abstract_mesh(mesh),
    pytest.raises(UserError, match=message),
  ):
    jax.eval_shape(
      functools.partial(decode, axes=AXES, mask=True), logits, merge
    )
