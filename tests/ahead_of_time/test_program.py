"""Counts of collectives, operations and cycles, on real and short programs."""

# The lines of a program are long.
# ruff: noqa: E501

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from narvl_jax.ahead_of_time.hlo import Array
from narvl_jax.ahead_of_time.program import Program, read_program

_SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}
_LAYERS, _ROWS, _WIDTH, _HIDDEN = 3, 48, 16, 64


def _mesh() -> Mesh:
  return jax.make_mesh(
    tuple(_SHAPE.values()), tuple(_SHAPE), axis_types=(AxisType.Auto,) * 3
  )


def _spec(mesh: Mesh, shape: tuple[int, ...], *axes: Any) -> Any:
  sharding = NamedSharding(mesh, P(*axes))
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


@functools.cache
def _scanned() -> Program:
  """Layers of two products under fsdp and tensor, run as a scan."""
  mesh = _mesh()

  def forward(x: jax.Array, layers: Any) -> jax.Array:
    def body(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
      h = jax.nn.relu(x @ w[0])
      return jnp.tanh(h @ w[1]), None

    return jnp.square(jax.lax.scan(body, x, layers)[0]).mean()

  x = _spec(mesh, (_ROWS, _WIDTH), ("data", "fsdp"))
  up = _spec(mesh, (_LAYERS, _WIDTH, _HIDDEN), None, "fsdp", "tensor")
  down = _spec(mesh, (_LAYERS, _HIDDEN, _WIDTH), None, "tensor", "fsdp")
  compiled = jax.jit(forward).lower(x, (up, down)).compile()
  return read_program(compiled.as_text())


def test_collectives_of_a_loop_count_once_per_iteration():
  program = _scanned()
  assert program.num_partitions == 8
  gathers = [c for c in program.collectives if c.kind == "all-gather"]
  assert {c.axes(_SHAPE) for c in gathers} == {("fsdp",)}
  half = _HIDDEN // 2
  assert program.shapes("all-gather") == {(_WIDTH, half), (half, _WIDTH)}
  assert [c.count for c in gathers] == [_LAYERS, _LAYERS]
  assert program.by_kind()["all-gather"] == (
    2 * _LAYERS,
    2 * _LAYERS * _WIDTH * half * 4,
  )
  sums = {
    c.axes(_SHAPE): (c.count, c.arrays[0].shape)
    for c in program.collectives
    if c.kind == "all-reduce"
  }
  assert sums == {
    ("tensor",): (_LAYERS, (_ROWS // 4, _WIDTH)),
    ("data", "fsdp"): (1, ()),
  }


def test_products_of_a_loop_count_once_per_iteration():
  one = 2 * (_ROWS // 4) * _WIDTH * (_HIDDEN // 2)
  assert _scanned().flops == _LAYERS * 2 * one


def test_arrays_outside_of_fusions():
  arrays = _scanned().arrays
  assert Array("f32", (_WIDTH, _HIDDEN // 2)) in arrays
  assert not any(a.shape == (_ROWS, _WIDTH) for a in arrays)
  assert any("tanh" in name for names in arrays.values() for name in names)


@pytest.mark.parametrize("backward", [False, True])
def test_convolutions_count_as_the_compiler_counts(backward: bool):
  def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  function = forward
  if backward:
    function = jax.grad(lambda x, k: jnp.square(forward(x, k)).sum(), (0, 1))
  x = jax.ShapeDtypeStruct((2, 12, 12, 4), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32)
  compiled = jax.jit(function).lower(x, kernel).compile()
  analysis: Any = compiled.cost_analysis()
  counted = read_program(compiled.as_text()).flops
  # The compiler also counts elementwise operations.
  assert counted == pytest.approx(analysis["flops"], rel=0.02)


def test_all_to_all_permute_and_reduce_scatter():
  mesh = _mesh()

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp")
  )
  def move(x: jax.Array) -> jax.Array:
    y = jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True)
    y = jax.lax.ppermute(y, "fsdp", [(0, 1), (1, 0)])
    return jax.lax.psum_scatter(y, "fsdp", tiled=True)

  text = jax.jit(move).lower(_spec(mesh, (8, 6), "fsdp")).compile().as_text()
  found = {c.kind: c for c in read_program(text).collectives}
  assert {c.axes(_SHAPE) for c in found.values()} == {("fsdp",)}
  elements = {kind: sum(a.size for a in c.arrays) for kind, c in found.items()}
  assert elements == {
    "all-to-all": 24,
    "collective-permute": 24,
    "reduce-scatter": 24,
  }


# A TPU's program in short: an all-gather that lasts through two fusions, a
# reduce-scatter in the form of a fusion, a loop without a known trip count.
_TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%start (p: bf16[8,4]) -> (bf16[8,4], bf16[8,16], u32[]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %ag.1 = bf16[8,16]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %cc = (bf16[8,4]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%overlap (p.2: bf16[8,4], q: bf16[2,8]) -> bf16[2,4] {
  %p.2 = bf16[8,4]{1,0} parameter(0)
  %q = bf16[2,8]{1,0} parameter(1)
  %ag.2 = bf16[8,16]{1,0} all-gather(%p.2), channel_id=1, replica_groups=[1,4]<=[4], dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %conv = bf16[2,4]{1,0} convolution(%q, %p.2), dim_labels=bf_io->bf, backend_config={"window_config":{"estimated_cycles":"999"}}
}

%done (p.3: bf16[8,4]) -> bf16[8,16] {
  %p.3 = bf16[8,4]{1,0} parameter(0)
  %ag.3 = bf16[8,16]{1,0} all-gather(%p.3), channel_id=1, replica_groups=[1,4]<=[4], dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %cd = bf16[8,16]{1,0} custom-call(%p.3, %ag.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.5 (x: f32[16,8]) -> f32[4,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %ar = f32[16,8]{1,0} all-reduce(%x), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  %zero = u32[] constant(0)
  ROOT %ds = f32[4,8]{1,0} dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={4,8}
}

%body (t: (s32[], bf16[8,4], bf16[2,8], f32[16,8])) -> (s32[], bf16[8,4], bf16[2,8], f32[16,8]) {
  %t = (s32[], bf16[8,4]{1,0}, bf16[2,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %w = bf16[8,4]{1,0} get-tuple-element(%t), index=1
  %h = bf16[2,8]{1,0} get-tuple-element(%t), index=2
  %g = f32[16,8]{1,0} get-tuple-element(%t), index=3
  %s = (bf16[8,4]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%start
  %o = bf16[2,4]{1,0} fusion(%w, %h), kind=kCustom, calls=%overlap, backend_config={"window_config":{"estimated_cycles":"100"}}
  %d = bf16[8,16]{1,0} fusion(%w), kind=kCustom, calls=%done
  %rs = f32[4,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.5
  ROOT %r = (s32[], bf16[8,4]{1,0}, bf16[2,8]{1,0}, f32[16,8]{1,0}) tuple(%t)
}

%cond (t.2: (s32[], bf16[8,4], bf16[2,8], f32[16,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %t.2 = (s32[], bf16[8,4]{1,0}, bf16[2,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t.2), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[8,4], bf16[2,8], f32[16,8])) -> f32[4] {
  %a = (s32[], bf16[8,4]{1,0}, bf16[2,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %loop = (s32[], bf16[8,4]{1,0}, bf16[2,8]{1,0}, f32[16,8]{1,0}) while(%a), condition=%cond, body=%body
  %v = f32[4]{0} constant({1,2,3,4}), backend_config={"window_config":{"estimated_cycles":"7"}}
  %cps = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%v), channel_id=3, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %cpd = f32[4]{0} collective-permute-done(%cps)
  ROOT %sum = f32[4]{0} all-reduce(%cpd), channel_id=4, replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, to_apply=%add
}
"""


def test_fused_and_overlapped_collectives_of_a_tpu():
  program = read_program(_TPU)
  assert program.by_kind() == {
    "all-gather": (6, 6 * 8 * 16 * 2),
    "all-reduce": (1, 16),
    "reduce-scatter": (6, 6 * 16 * 8 * 4),
    "collective-permute": (1, 16),
  }
  axes = {c.kind: c.axes({"data": 2, "fsdp": 2}) for c in program.collectives}
  assert axes["all-gather"] == ("data", "fsdp")
  assert axes["collective-permute"] == axes["all-reduce"] == ("data",)


def test_cycles_and_products_of_a_tpu():
  program = read_program(_TPU)
  assert program.cycles == 6 * 100 + 7
  assert program.flops == 6 * 2 * 2 * 8 * 4


def test_arrays_within_fusions_do_not_count():
  arrays = read_program(_TPU).arrays
  assert arrays[Array("f32", (4, 8))] == {""}
  # What a fusion reads, or has within it.
  assert Array("f32", (16, 8)) not in arrays


def test_bytes_that_a_device_receives_in_a_ring():
  traffic = {c.kind: c.traffic(4) for c in read_program(_TPU).collectives}
  assert traffic == {
    "all-gather": (0.75 * 6 * 256, 0),
    "reduce-scatter": (0.75 * 6 * 512, 0),
    "all-reduce": (2 * 0.5 * 16, 0),
    "collective-permute": (16, 0),
  }


def test_bytes_that_cross_slices():
  # Two devices a slice: gathers span both, the last two kinds only cross.
  traffic = {c.kind: c.traffic(2) for c in read_program(_TPU).collectives}
  assert traffic == {
    "all-gather": (0.5 * 6 * 256, 0.5 * 6 * 256 / 2),
    "reduce-scatter": (0.5 * 6 * 512, 0.5 * 6 * 512 / 2),
    "all-reduce": (0, 2 * 0.5 * 16),
    "collective-permute": (0, 16),
  }
