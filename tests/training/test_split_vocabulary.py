"""The whole train and predict step on a mesh that splits the vocabulary."""

import jax
import numpy as np
import pytest

from narvl_jax.ahead_of_time.program import read_program
from narvl_jax.decoding import Classes, ParallelReader, make_steps
from narvl_jax.parallel import (
  AXES,
  BATCH_AXES,
  VOCAB_AXIS,
  activation_rules,
  shard_batch,
)
from narvl_jax.query_ctc import MeshAxes
from tests.support import runs

# Numbers that no other array has: of the table with its padding, and the part
# of a device.
ROWS, SHARD = 144, 72
SHAPE = (2, 2, 2)

pytestmark = pytest.mark.skipif(
  len(jax.devices()) < 8, reason="needs 8 devices"
)


def setup(shape, chunk):
  return runs.setup(shape, model__vocab_multiple=SHARD, loss__chunk_size=chunk)


def check(text):
  """Returns the shapes that cross `tensor`; nothing is whole anywhere."""
  program = read_program(text)
  sizes: dict[str, int] = dict(zip(AXES, SHAPE, strict=True))
  # But for the mask of the classes that are padding.
  shapes = {array.shape for array in program.arrays} - {(ROWS,)}
  dims = {n for shape in shapes for n in shape}
  assert SHARD in dims
  assert not dims & {ROWS, runs.VOCAB}
  crossing = {
    array.shape
    for found in program.collectives
    for array in found.arrays
    if "tensor" in found.axes(sizes)
  }
  assert not any(SHARD in shape for shape in crossing)
  return crossing


def test_train_step_in_chunks():
  run = setup(SHAPE, 50)
  assert run.abstract_state.params["embed_tokens"].shape[0] == ROWS
  text = run.compile_step().as_text()
  rows = runs.ROWS // 4
  wanted = {(rows, runs.QUERIES), (rows, runs.QUERIES, runs.LABELS + 1)}
  assert wanted <= check(text)
  expected = runs.losses(setup((1, 1, 1), 0), 3)
  np.testing.assert_allclose(runs.losses(run, 3), expected, rtol=1e-6, atol=0)


def predict_step(run):
  classes = Classes.of(runs.VOCAB, pad_id=1, blank_id=runs.VOCAB - 1)
  axes = MeshAxes(BATCH_AXES, VOCAB_AXIS)
  rules = activation_rules(run.experiment.config.mesh.rules)
  reader = ParallelReader(classes, axes=axes)
  return make_steps(run.experiment.model, reader, rules).predict


def test_predict_step():
  run, single = setup(SHAPE, 0), setup((1, 1, 1), 0)
  batch = {
    name: runs.host_batch(0)[name] for name in ("image", "text", "image_mask")
  }
  batch["merge_repeats"] = np.arange(runs.ROWS) % 2 == 0
  lengths = np.zeros(2, np.int32)
  params = single.init(jax.random.key(0)).params
  expected = predict_step(single)({"params": params}, **batch, lengths=lengths)
  with jax.set_mesh(run.mesh):
    variables = {"params": jax.device_put(params, run.shardings.params)}
    args = shard_batch(batch, run.mesh)
    step = predict_step(run).lower(variables, **args, lengths=lengths).compile()
    found = step(variables, **args, lengths=lengths)
  np.testing.assert_array_equal(found["ids"], expected["ids"])
  np.testing.assert_allclose(
    np.exp(found["log_probs"]), np.exp(expected["log_probs"]), rtol=1e-4
  )
  rows, queries = runs.ROWS // 4, runs.QUERIES
  assert {(rows, queries), (rows, queries, queries + 1)} <= check(
    step.as_text()
  )
