"""Rules that rename or drop stored parameters."""

from typing import Any

import pytest

from narvl_jax.errors import UserError
from narvl_jax.state.renames import (
  dropped,
  parse_drops,
  parse_renames,
  rename,
)

STORED = [
  "params/encoder/layers/mlp/kernel",
  "params/encoder/layers/mlp/bias",
  "params/encoder/bn/scale",
  "batch_stats/encoder/bn/mean",
]


def test_the_first_rename_that_matches_a_whole_name_counts() -> None:
  rules = parse_renames(
    [
      ("encoder/layers/mlp/kernel", "encoder/layers/ffn/matrix"),
      (r"encoder/layers/mlp/(\w+)", r"encoder/layers/ffn/\1"),
      ("encoder/(bn)/(.*)", r"encoder/resnet/\1/\2"),
    ]
  )
  assert rename(STORED, rules) == {
    "params/encoder/layers/ffn/matrix": STORED[0],
    "params/encoder/layers/ffn/bias": STORED[1],
    # One rule applies to both collections.
    "params/encoder/resnet/bn/scale": STORED[2],
    "batch_stats/encoder/resnet/bn/mean": STORED[3],
  }
  assert rename(STORED, ()) == {name: name for name in STORED}


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    (
      [("encoder/layers/mpl/(.*)", "x")],
      r'"encoder/layers/mpl/\(.\*\)" is never used: it matches no stored name.'
      r' Did you mean "encoder/layers/mlp.*config.init_renames',
    ),
    # A part of a name is not enough.
    ([("mlp", "ffn")], 'init_renames: "mlp" is never used'),
    (
      [("encoder/.*/bias", r"\g<0>2"), ("encoder/layers/mlp/bias", "x")],
      "mlp/bias.* is never used: earlier rules match all its names",
    ),
    (
      [("encoder/layers/mlp/.*", "encoder/layers/mlp/both")],
      'mlp/kernel" and ".*mlp/bias" of the stored weights would both become'
      ' "encoder/layers/mlp/both"',
    ),
    (
      [("encoder/layers/mlp/bias", "encoder/bn/scale")],
      'would both become "encoder/bn/scale"',
    ),
  ],
)
def test_renames_without_sense(rules: Any, message: str) -> None:
  with pytest.raises(UserError, match=message):
    rename(STORED, parse_renames(rules))


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    (("a", "b"), r"init_renames: 'a' is not a pair"),
    ([("a", 1)], r"\('a', 1\) is not a pair \(regex"),
    ([("a", "b", "c")], "is not a pair"),
    ([("(", "b")], r'init_renames: regex "\(" does not compile'),
    ([("a(b)", r"\2")], r'"\\2" does not fit "a\(b\)", which has 1 groups'),
    ([("a", r"\g<x>")], "does not fit"),
  ],
)
def test_renames_that_are_none(rules: Any, message: str) -> None:
  with pytest.raises(UserError, match=message):
    parse_renames(rules)


def test_drops_match_whole_names() -> None:
  assert dropped(STORED, parse_drops(["encoder/bn/.*", ".*/bias"])) == set(
    STORED[1:]
  )
  assert dropped(STORED, ()) == set()
  with pytest.raises(
    UserError,
    match=r'init_drops: "encoder/bm/.\*" is never used: it matches no name'
    r' there or here. Did you mean "encoder/bn',
  ):
    dropped(STORED, ("encoder/bm/.*",))
  # A part of a name is not enough.
  # A module is suggested as the regex of its content.
  with pytest.raises(
    UserError, match=r'"encoder/bn" is never used: .* mean "encoder/bn/\.\*"'
  ):
    dropped(STORED, ("encoder/bn",))
  with pytest.raises(UserError, match=r'init_drops: regex "\[" does not'):
    parse_drops(["["])
  with pytest.raises(UserError, match=r"init_drops: 3 is not the regex"):
    parse_drops([3])
