"""Cost of instructions: HBM bytes, kernels, and parts of the model."""

# The lines of a program are long.
# ruff: noqa: E501

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from narvl_jax.ahead_of_time import sources
from narvl_jax.ahead_of_time.costs import Line, read_lines
from narvl_jax.ahead_of_time.hlo import hbm_bytes, parse
from narvl_jax.ahead_of_time.program import read_program
from narvl_jax.ahead_of_time.topology import CHIPS, get_topology

_CHIP = CHIPS["v5e"]
# A loop that ends by a condition on data: it reads one row of a table in HBM
# and updates one row of another in place. What lies in VMEM costs nothing.
_LOOP = """\
HloModule jit_f, num_partitions=1

%fused (t: f32[64,128], out: f32[64,128], i: s32[]) -> f32[64,128] {
  %t = f32[64,128]{1,0} parameter(0)
  %out = f32[64,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,128]{1,0} dynamic-slice(%t, %i, %zero), dynamic_slice_sizes={1,128}
  %twice = f32[1,128]{1,0} add(%row, %row)
  ROOT %new = f32[64,128]{1,0} dynamic-update-slice(%out, %twice, %i, %zero)
}

%body (s: (f32[64,128], f32[64,128], s32[])) -> (f32[64,128], f32[64,128], s32[]) {
  %s = (f32[64,128]{1,0}, f32[64,128]{1,0}, s32[]) parameter(0)
  %a = f32[64,128]{1,0} get-tuple-element(%s), index=0
  %b = f32[64,128]{1,0} get-tuple-element(%s), index=1
  %k = s32[] get-tuple-element(%s), index=2
  %u = f32[64,128]{1,0} fusion(%a, %b, %k), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/decoder/mul"}, backend_config={"estimated_cycles":"50"}
  %fast = f32[64,128]{1,0:T(8,128)S(1)} copy(%near), backend_config={"estimated_cycles":"10"}
  ROOT %r = (f32[64,128]{1,0}, f32[64,128]{1,0}, s32[]) tuple(%a, %u, %k)
}

%cond (s.2: (f32[64,128], f32[64,128], s32[])) -> pred[] {
  %s.2 = (f32[64,128]{1,0}, f32[64,128]{1,0}, s32[]) parameter(0)
  %done = pred[] custom-call(%s.2), custom_call_target="x"
  ROOT %not = pred[] not(%done)
}

ENTRY %main (p: (f32[64,128], f32[64,128], s32[])) -> (f32[64,128], f32[64,128], s32[]) {
  %p = (f32[64,128]{1,0}, f32[64,128]{1,0}, s32[]) parameter(0)
  ROOT %loop = (f32[64,128]{1,0}, f32[64,128]{1,0}, s32[]) while(%p), condition=%cond, body=%body
}
"""


def test_rows_and_updates_in_place() -> None:
  fusion, copy = read_lines(parse(_LOOP), unknown_trips=7)
  assert (fusion.op_name, fusion.count) == ("jit(f)/decoder/mul", 7)
  # One row is read, one is written, and the index is read.
  assert fusion.hbm_bytes == 7 * (2 * 128 * 4 + 4)
  assert (copy.hbm_bytes, copy.cycles) == (0, 70)
  program = read_program(_LOOP)
  assert (program.cycles, program.kernels) == (60, [])


def test_an_array_under_another_name_is_read_as_a_whole() -> None:
  """A fusion in a fusion that only reshapes; a product reads its result."""
  text = """\
HloModule jit_f, num_partitions=1

%renamed (x: f32[8,128]) -> f32[1024] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %b = f32[1024]{0} bitcast(%x)
}

%outer (y: f32[8,128]) -> f32[1024] {
  %y = f32[8,128]{1,0} parameter(0)
  %z = f32[1024]{0} fusion(%y), kind=kLoop, calls=%renamed
  ROOT %e = f32[1024]{0} exponential(%z)
}

ENTRY %main (a: f32[8,128]) -> f32[1024] {
  %a = f32[8,128]{1,0} parameter(0)
  ROOT %f = f32[1024]{0} fusion(%a), kind=kLoop, calls=%outer
}
"""
  (line,) = read_lines(parse(text))
  assert line.hbm_bytes == 2 * 4 * 1024


def test_bytes_in_vmem_do_not_count() -> None:
  text = "(f32[8,128]{1,0:T(8,128)S(1)}, bf16[4]{0:T(256)}, u32[])"
  assert hbm_bytes(text) == 4 * 2 + 4
  assert hbm_bytes(text, everywhere=True) == 8 * 128 * 4 + 4 * 2 + 4


# Programs for a TPU are cached, but without one they cannot be read again.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_kernels_take_their_cost_estimate() -> None:
  """A `pallas_call` in a loop of three, compiled for a v5e."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install narvl_jax[aot]")
  size, flops = 128, 10**9
  device = get_topology("v5e:2x2").devices[0]
  place = NamedSharding(Mesh(np.array([device]), ("x",)), P())
  shape = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=place)

  def double(x: Any, out: Any) -> None:
    out[...] = x[...] + x[...]

  def kernel(x: jax.Array, estimate: pl.CostEstimate | None) -> jax.Array:
    call = pl.pallas_call(double, out_shape=x, cost_estimate=estimate)
    return jax.lax.scan(lambda y, _: (call(y), None), x, length=3)[0]

  def both(x: jax.Array) -> jax.Array:
    cost = pl.CostEstimate(flops=flops, bytes_accessed=7, transcendentals=0)
    return kernel(kernel(x, cost), None)

  text = jax.jit(both).lower(shape).compile().as_text()
  known, blind = sorted(read_program(text).kernels, key=lambda k: k.blind)
  assert (known.count, known.flops, known.hbm_bytes) == (3, 3 * flops, 21)
  assert known.seconds(_CHIP) == 3 * flops / (0.4 * _CHIP.peak_flops)
  # Without an estimate: operands and results, where they lie in HBM.
  assert (blind.count, blind.flops, blind.blind) == (3, 0, True)


@pytest.mark.parametrize(
  ("name", "part"),
  [
    (
      "jit(train_step)/jvp(NARVL)/NARVL.encode/encoder/while/body/closed_call"
      "/layers/self_attn/bqhd,bkhd->bhqk/dot_general",
      "encoder attention",
    ),
    (
      "jit(train_step)/jvp(NARVL)/NARVL.encode/encoder/while/body/closed_call"
      "/layers/self_attn/qkv/...e,enhd->...nhd/dot_general",
      "encoder projections",
    ),
    (
      "jit(train_step)/transpose(jvp(NARVL))/NARVL.encode/encoder/resnet/while"
      "/body/closed_call/layer3_rest/bn3/reduce_sum",
      "ResNet BatchNorm",
    ),
    ("jit(s)/jvp(NARVL)/encoder/layers/ffn/ffn_layernorm/mul", None),
    ("jit(s)/jvp(NARVL)/encoder/stem/conv1/conv_general_dilated", "image stem"),
    ("jit(s)/jvp(NARVL)/NARVL.decode/decoder/layers/ffn/dot", "decoder"),
    ("jit(train_step)/transpose(jvp())/dot_general", "loss head"),
    ("jit(train_step)/jvp(loss_head)/jvp()/while/body/add", "loss head"),
    ("jit(train_step)/jvp(metrics)/reduce_sum", "metrics"),
    ("jit(train_step)/optimizer/mul", "optimizer"),
    ("jit(train_step)/ema/add", "moving averages"),
    ("jit(train_step)/mul", "other"),
    ("", "unnamed copies"),
  ],
)
def test_parts_by_name(name: str, part: str | None) -> None:
  assert sources.part_of(name) == (part or "encoder layer norms")


def test_table_of_parts() -> None:
  def line(name: str, milliseconds: float) -> Line:
    cycles = milliseconds * _CHIP.clock / 1e3
    return Line("f.1", "fusion", "f32[8]{0}", name, 2, cycles, 1e9, 2e9)

  ffn = "/encoder/ffn/dot_general"
  parts = sources.split(
    [
      line(f"jvp(x){ffn}", 1.0),
      line(f"transpose(jvp(x)){ffn}", 2.0),
      line(f"transpose(jvp(x))/rematted_computation{ffn}", 4.0),
      line("jit(train_step)/optimizer/add", 0.5),
    ],
    _CHIP,
  )
  assert [part.name for part in parts] == [
    "encoder FFN",
    "optimizer",
  ]
  found = parts[0]
  assert (found.forward, found.backward, found.recomputed) == pytest.approx(
    (1e-3, 2e-3, 4e-3)
  )
  assert (found.flops, found.hbm_bytes) == (3e9, 6e9)
  text = sources.format_parts([line(ffn, 3.0), line("", 1.0)], _CHIP)
  assert "encoder FFN     3.00  75.0     3.00" in text
  assert "largest instruction: 2 x f.1 f32[8], 3.00 ms, 2.00 GB" in text
  head = [line("query_ctc", 3.0)]
  whole, chunked = (
    sources.format_parts(head, _CHIP, chunked=chunked)
    for chunked in (False, True)
  )
  assert "loss.chunk_size" in chunked
  assert "loss.chunk_size" not in whole
