"""A vocabulary split over a mesh: same numbers, and what crosses devices."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from narvl_jax.ahead_of_time.program import read_program
from narvl_jax.ahead_of_time.topology import get_topology
from narvl_jax.errors import UserError
from narvl_jax.models import project
from narvl_jax.parallel import AXES as MESH_AXES
from narvl_jax.parallel import BATCH_AXES, VOCAB_AXIS, WIDTH_AXIS, make_mesh
from narvl_jax.query_ctc import (
  ChunkedLogits,
  MeshAxes,
  query_ctc_objective,
)
from narvl_jax.query_ctc.axes import Split, split_of

AXES = MeshAxes(BATCH_AXES, VOCAB_AXIS, WIDTH_AXIS)
MESHES = [(1, 1, 8), (2, 2, 2)]
# On 8 devices the last one has nothing but padding.
B, N, L, D, ROWS, CLASSES = 8, 4, 3, 24, 256, 220
BLANK = CLASSES - 1
# Chunks of the 32 or 128 rows of a device: with overlap, and all at once.
HEADS = {"dense": 0, "chunked": 24, "one chunk": 1000}

needs_devices = pytest.mark.skipif(
  len(jax.devices()) < 8, reason="needs 8 devices"
)


def mesh_of(shape, devices=None) -> Mesh:
  return make_mesh(*shape, devices=devices)


@functools.cache
def problem():
  rng = np.random.default_rng(0)
  states = rng.standard_normal((B, N, D), np.float32)
  table = rng.standard_normal((ROWS, D), np.float32)
  # Padding that would win everywhere.
  table[CLASSES:] = 9.0
  # Of all devices, none, with a repeat, and one that does not fit.
  labels = rng.integers(0, BLANK, (B, L)).astype(np.int32)
  labels[0], labels[1], labels[2] = (0, 100, 218), (31, 31, 32), (5, 5, 5)
  lengths = np.array([3, 2, 3, 0, 1, 2, 3, 3], np.int32)
  labels[2], lengths[2] = (5, 5, 5), 3
  confidence = rng.uniform(0.2, 1.0, B).astype(np.float32)
  return states, table, labels, lengths, confidence


def objective(states, table, labels, lengths, confidence, *, chunk, axes):
  logits = (
    ChunkedLogits(states, table, chunk) if chunk else project(states, table)
  )
  return query_ctc_objective(
    logits,
    labels,
    lengths,
    blank_id=BLANK,
    vocab_size=CLASSES,
    label_smoothing=0.2,
    confidence=confidence,
    confidence_mode="temper",
    axes=axes,
  )


@functools.cache
def reference():
  """Loss, metrics and gradients on one device."""
  run = functools.partial(objective, chunk=0, axes=MeshAxes())
  return jax.device_get(
    jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(*problem())
  )


def place(mesh: Mesh):
  """Shardings of the arguments."""
  rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  table = NamedSharding(mesh, PartitionSpec(VOCAB_AXIS, WIDTH_AXIS))
  return rows, table, rows, rows, rows


@functools.cache
def step_on(shape, chunk):
  """Compiled loss and gradients, and the mesh."""
  mesh = mesh_of(shape)
  return compile_step(mesh, chunk, problem()), mesh


def compile_step(mesh, chunk, args):
  shardings = place(mesh)
  args = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    for x, s in zip(args, shardings, strict=True)
  ]
  run = functools.partial(objective, chunk=chunk, axes=AXES)
  with jax.set_mesh(mesh):
    step = jax.jit(
      jax.value_and_grad(run, argnums=(0, 1), has_aux=True),
      out_shardings=(None, shardings[:2]),
    )
    return step.lower(*args).compile()


@needs_devices
@pytest.mark.parametrize("chunk", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("shape", MESHES)
def test_same_numbers_as_on_one_device(shape, chunk):
  step, mesh = step_on(shape, chunk)
  (loss, metrics), gradients = step(*jax.device_put(problem(), place(mesh)))
  (expected, expected_metrics), expected_gradients = reference()
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert metrics["infeasible_fraction"] == 1 / B
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-6)
  for found, wanted in zip(gradients, expected_gradients, strict=True):
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < 1e-6
  assert not np.any(gradients[1][CLASSES:])


def check_collectives(text, mesh, batch, classes, width, num_labels, blocks=1):
  """Only these cross `tensor`, and nothing of the vocabulary is whole."""
  program = read_program(text)
  sizes = dict(mesh.shape)
  b = batch // (sizes["data"] * sizes["fsdp"])
  shard = classes // sizes["tensor"]
  block = b // blocks
  queries, columns = (block, N), (block, N, num_labels + 1)
  # The gradient crosses once, after all blocks.
  states = (b, N, width)
  crossing = [c for c in program.collectives if "tensor" in c.axes(sizes)]
  shapes = [a.shape for c in crossing for a in c.arrays]
  # The scalars are the mean over the batch; XLA may write it so.
  assert {s for s in shapes if s} == {queries, columns, states}
  assert {c.kind for c in crossing} == {"all-reduce"}
  assert shapes.count(columns) == 1
  assert shapes.count(states) == 1
  assert shapes.count(queries) == 3
  # Over the other axes only the table of the own rows moves, as under fsdp.
  numbers = shard * width
  for found in program.collectives:
    for array in found.arrays if found not in crossing else ():
      assert array.size in {1, b, numbers, numbers // sizes["fsdp"]}
  for array in program.arrays:
    assert classes not in array.shape
    assert array.size < max(b * N * classes, classes * width)
  return program


@needs_devices
@pytest.mark.parametrize("chunk", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("shape", MESHES)
def test_communication_of_a_split_vocabulary(shape, chunk):
  step, mesh = step_on(shape, chunk)
  # A block has at least as many logits as a device's table has numbers.
  blocks = 2 if shape == (1, 1, 8) and chunk == HEADS["chunked"] else 1
  program = check_collectives(step.as_text(), mesh, B, ROWS, D, L, blocks)
  b, shard = B // math.prod(shape[:2]), ROWS // shape[2]
  sizes = {array.size for array in program.arrays}
  assert (b * N * shard in sizes) == (blocks == 1)


# Programs for a TPU are cached, but without one they cannot be read again.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("chunk", [0, 4096], ids=["dense", "chunked"])
def test_communication_on_tpus(chunk):
  """Compiled for 8 chips, at the size of the official vocabulary."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install narvl_jax[aot]")
  mesh = mesh_of((2, 1, 4), get_topology("v5e:2x4").devices)
  batch, classes, width = 16, 59520, 256
  shapes = [(batch, N, width), (classes, width), (batch, L), (batch,), (batch,)]
  types = [jnp.bfloat16, jnp.float32, jnp.int32, jnp.int32, jnp.float32]
  args = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, types, strict=True)]
  step = compile_step(mesh, chunk, args)
  program = check_collectives(step.as_text(), mesh, batch, classes, width, L)
  assert program.cycles > 0


def abstract_mesh(*shape):
  """A mesh without devices, to be traced under."""
  return jax.sharding.use_abstract_mesh(
    AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
  )


@pytest.mark.parametrize("chunk", [0, 100])
@pytest.mark.parametrize(
  ("tensor", "rows", "multiple"), [(8, 252, 128), (3, 256, 384)]
)
def test_vocabulary_must_divide(chunk, tensor, rows, multiple):
  message = (
    rf'table of {rows} rows does not divide by mesh axis "tensor" of {tensor};'
    rf".* --config.model.vocab_multiple={multiple}\b"
  )
  args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem()]
  args[1] = jax.ShapeDtypeStruct((rows, D), jnp.float32)
  run = functools.partial(objective, chunk=chunk, axes=AXES)
  with abstract_mesh(1, 1, tensor), pytest.raises(UserError, match=message):
    jax.eval_shape(run, *args)


def test_axes_split_only_sizes_they_divide():
  assert split_of(AXES, 8, 256, D) == Split()
  with abstract_mesh(2, 4, 2):
    assert split_of(AXES, 8, 256, D) == Split(BATCH_AXES, "tensor", "fsdp")
    assert split_of(AXES, 8, 256) == Split(BATCH_AXES, "tensor")
    # One request alone, and a width that cannot be shared.
    assert split_of(AXES, 1, 256, D) == Split(vocab="tensor")
    assert split_of(AXES, 8, 256, 6) == Split(BATCH_AXES, "tensor")
    assert split_of(MeshAxes(), 8, 257, D) == Split()
  with abstract_mesh(2, 1, 1):
    assert split_of(AXES, 8, 257, D) == Split(("data",))
