"""Communication between devices in a train step, by axis of the mesh."""

import functools

from narvl_jax.ahead_of_time.program import Collective, read_program
from narvl_jax.state.parameters import flatten
from tests.support import runs

SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


@functools.cache
def collectives() -> tuple[Collective, ...]:
  run = runs.setup((2, 2, 2))
  return read_program(run.compile_step().as_text()).collectives


def test_only_weights_and_sums_are_communicated():
  moved = [
    c
    for c in collectives()
    if c.kind not in ("all-gather", "all-reduce", "all-to-all")
  ]
  # Where `tensor` has no part in a weight, XLA lets it share the product that
  # is the gradient, and moves the parts to where they are stored.
  for collective in moved:
    assert collective.kind == "collective-permute", collective
    assert "transpose(jvp" in collective.op_name, collective
    for array in collective.arrays:
      assert sorted(array.shape) in _parts_of_unsplit_weights(), collective
  assert len(moved) < 5


def test_columns_of_looked_up_rows_are_exchanged():
  """Instead of a gathered table, and of its gradient."""
  exchanged = [c for c in collectives() if c.kind == "all-to-all"]
  assert len(exchanged) == 2, exchanged
  for collective in exchanged:
    assert collective.axes(SHAPE) == ("fsdp",), collective
    assert "encoder/sharding_constraint" in collective.op_name
  assert sum("transpose(jvp" in c.op_name for c in exchanged) == 1


@functools.cache
def _parts_of_unsplit_weights() -> list[list[int]]:
  """Shapes of what a device has of the weights without an axis `tensor`."""
  run = runs.setup((2, 2, 2))
  shardings = flatten(run.shardings.params)
  shapes = []
  for path, leaf in flatten(run.abstract_state.params).items():
    if "tensor" not in shardings[path].spec:
      part = shardings[path].shard_shape(leaf.shape)
      # The half of the gradient that one of two devices computes may lie
      # along another dimension than the half that it keeps.
      halves = [
        (*leaf.shape[:i], leaf.shape[i] // 2, *leaf.shape[i + 1 :])
        for i in range(leaf.ndim)
      ]
      shapes += [sorted(shape) for shape in (part, *halves)]
  return shapes


def test_weights_are_gathered_over_fsdp_and_nothing_else_is():
  run = runs.setup((2, 2, 2))
  weights = set()
  for path, leaf in flatten(run.abstract_state.params).items():
    # A device has half of the heads, of the feed-forward block, ...
    shape = flatten(run.shardings.params)[path].shard_shape(leaf.shape)
    whole = tuple(
      full if axes == "fsdp" else part
      for full, part, axes in zip(
        leaf.shape,
        shape,
        flatten(run.shardings.params)[path].spec,
        strict=True,
      )
    )
    # One layer of a stack at a time.
    weights |= {whole, (1, *whole[1:]), whole[1:]}
  # XLA may transpose what it gathers.
  known = {tuple(sorted(shape)) for shape in weights}
  gathered = [
    c
    for c in collectives()
    # But for the ids of tokens.
    if c.kind == "all-gather" and c.arrays[0].dtype != "s32"
  ]
  assert len(gathered) > 20
  for collective in gathered:
    assert collective.axes(SHAPE) == ("fsdp",), collective
    for array in collective.arrays:
      assert tuple(sorted(array.shape)) in known, collective


def test_only_sums_cross_tensor():
  crossing = [c for c in collectives() if "tensor" in c.axes(SHAPE)]
  assert len(crossing) > 5
  assert {c.kind for c in crossing} <= {"all-reduce", "collective-permute"}
  # Biases of attention are made on the device that needs them.
  squares = {runs.QUERIES, runs.TEXT + (runs.SIDE // 8) ** 2}
  for collective in crossing:
    for array in collective.arrays:
      square = len(array.shape) > 2 and {*array.shape[-2:]} <= squares
      assert not square, collective


def test_gradients_of_biases_are_summed_at_their_tables():
  tokens = runs.TEXT + (runs.SIDE // 8) ** 2
  # Only the position bias is made of two weights and not of a table.
  squares = [
    c
    for c in collectives()
    for array in c.arrays
    if array.shape[-2:] == (tokens, tokens)
  ]
  assert sum(c.count for c in squares) <= 1, squares
