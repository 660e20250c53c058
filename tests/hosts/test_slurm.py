"""Lists of nodes as SLURM writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narvl_jax.hosts.slurm import expand_nodes


@pytest.mark.parametrize(
  ("text", "nodes"),
  [
    ("node1", "node1"),
    ("node1,other-2.cluster", "node1 other-2.cluster"),
    ("node[5]", "node5"),
    ("node[003-004]", "node003 node004"),
    ("node[001,007-009],host2", "node001 node007 node008 node009 host2"),
    ("n[9-11]", "n9 n10 n11"),
    ("n[08-10]", "n08 n09 n10"),
    ("[1-2]", "1 2"),
    ("n[1-2]-ib", "n1-ib n2-ib"),
    (
      "rack[1-2]-gpu[1-3]",
      "rack1-gpu1 rack1-gpu2 rack1-gpu3 rack2-gpu1 rack2-gpu2 rack2-gpu3",
    ),
    ("r[1-2][0-1]x,b[07],c", "r10x r11x r20x r21x b07 c"),
  ],
)
def test_lists(text: str, nodes: str) -> None:
  assert expand_nodes(text) == nodes.split()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", '"" is not a list of nodes'),
    ("a,", "not a list of nodes"),
    (",a", "not a list of nodes"),
    ("a[1", "not a list of nodes"),
    ("a]", "not a list of nodes"),
    ("a[[1]]", "not a list of nodes"),
    ("a[]", r"\[\]. is not a list of numbers"),
    ("a[1-]", "not a list of numbers"),
    ("a[x-y]", "not a list of numbers"),
    ("a[3-1]", '"3-1" runs backwards'),
    ("a[0-99999999999]", "over 1,048,576 nodes"),
    ("a[0-9999][0-9999]", "over 1,048,576 nodes"),
    ("a b", "not a list of nodes"),
  ],
)
def test_texts_that_are_not_lists(text: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    expand_nodes(text)


_NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,5}", fullmatch=True)
_RANGES = st.lists(
  st.tuples(st.integers(0, 200), st.integers(0, 3), st.integers(1, 4)),
  min_size=1,
  max_size=3,
)


@given(
  st.lists(
    st.lists(st.tuples(_NAMES, _RANGES), min_size=1, max_size=2),
    min_size=1,
    max_size=3,
  )
)
def test_shared_values_are_restored(
  given_nodes: list[list[tuple[str, list[tuple[int, int, int]]]]],
) -> None:
  """Nodes of several brackets each, written as SLURM abbreviates them."""
  texts, expected = [], []
  for node in given_nodes:
    text, names = "", [""]
    for prefix, ranges in node:
      numbers = [
        f"{number:0{width}}"
        for first, more, width in ranges
        for number in range(first, first + more + 1)
      ]
      bracket = ",".join(
        f"{first:0{width}}-{first + more:0{width}}"
        if more
        else f"{first:0{width}}"
        for first, more, width in ranges
      )
      text += f"{prefix}[{bracket}]"
      names = [name + prefix + number for name in names for number in numbers]
    texts.append(text)
    expected += names
  assert expand_nodes(",".join(texts)) == expected
