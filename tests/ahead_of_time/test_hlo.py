"""Parsing of program texts, each form on a short sample."""

# The lines of a program are long.
# ruff: noqa: E501

import pytest

from narvl_jax.ahead_of_time.hlo import Array, parse, parse_groups, tuple_parts

_TEXT = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

%fused (p.1: bf16[2,3]) -> bf16[2,3] {
  %p.1 = bf16[2,3]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %neg = bf16[2,3]{1,0:T(8,128)(2,1)} negate(%p.1)
}

ENTRY %main (a: bf16[2,3]) -> (bf16[2,3], f32[], /*index=2*/s32[2]) {
  %a = bf16[2,3]{1,0:T(8,128)(2,1)S(1)} parameter(0), sharding={devices=[4]<=[4]}
  %c = f32[]{:T(128)} constant(7)
  %f = bf16[2,3]{1,0} fusion(%a), kind=kCustom, calls=%fused, metadata={op_name="a (b) c"}
  ROOT %t = (bf16[2,3]{1,0}, f32[]{:T(128)}, /*index=2*/s32[2]{0}) tuple(%f, %c, /*index=2*/%a)
}
"""


def test_instructions_of_each_computation():
  module = parse(_TEXT)
  assert (module.entry, module.num_partitions) == ("main", 4)
  assert list(module.computations) == ["fused", "main"]
  a, c, fusion, root = module.computations["main"]
  assert (a.name, a.opcode, a.arrays) == (
    "a",
    "parameter",
    (Array("bf16", (2, 3)),),
  )
  assert (c.opcode, c.arguments, c.arrays[0].bytes) == ("constant", "7", 4)
  assert (fusion.opcode, fusion.operands) == ("fusion", ("a",))
  assert fusion.called("calls") == ["fused"]
  assert fusion.attribute("kind") == "kCustom"
  assert fusion.attribute("nothing") is None
  assert root.operands == ("f", "c", "a")
  assert [x.bytes for x in root.arrays] == [12, 4, 8]


def test_what_is_no_program():
  with pytest.raises(ValueError, match="no ENTRY"):
    parse("HloModule empty\n")


def test_parts_of_a_nested_tuple():
  text = "((f32[2]{0}, s8[3]{0:T(4)(1)}), u32[])"
  assert tuple_parts(text) == ["(f32[2]{0}, s8[3]{0:T(4)(1)})", "u32[]"]


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("", [(0, 1, 2, 3, 4, 5, 6, 7)]),
    ("{}", [(0, 1, 2, 3, 4, 5, 6, 7)]),
    ("{{0,2},{1, 3}}", [(0, 2), (1, 3)]),
    ("[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ("[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
    ("mesh['a'=2,'b'=4] {'b'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ("mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
    ("mesh['a'=2,'b'=2,'c'=2] {'a','b'}", [(0, 2, 4, 6), (1, 3, 5, 7)]),
    # Order within a group is that of the axes named.
    ("mesh['a'=2,'b'=2,'c'=2] {'b','a'}", [(0, 4, 2, 6), (1, 5, 3, 7)]),
    # Half of an axis of eight: its outer part of two, its inner part of four.
    ("mesh['a'=8] {'a':(1)2}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
    ("mesh['a'=8] {'a':(2)4}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
    (
      "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
      [(0, 2, 4, 6), (1, 3, 5, 7)],
    ),
  ],
)
def test_replica_groups(text: str, groups: list[tuple[int, ...]]):
  assert parse_groups(text, 8) == tuple(groups)


def test_unknown_replica_groups():
  with pytest.raises(ValueError, match="unknown replica groups"):
    parse_groups("@everyone", 8)
