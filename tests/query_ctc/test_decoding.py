"""Collapse on written-out cases and against plain Python."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax import query_ctc
from narvl_jax.query_ctc import collapse
from tests.query_ctc import reference

BLANK, PAD = 9, 1


@pytest.mark.parametrize(
  ("ids", "merge_repeats", "expected"),
  [
    ([5, 5, 9, 5, 6, 6, 9, 9, 2, 2], True, [5, 5, 6, 2]),
    ([5, 5, 9, 5, 6, 6, 9, 9, 2, 2], False, [5, 5, 5, 6, 6, 2, 2]),
    ([9, 9, 9, 9], True, []),
    ([1, 9, 1, 1], False, []),
    ([5, 1, 5, 1], True, [5, 5]),
    ([1, 1, 1, 7], True, [7]),
    ([9, 0, 2, 9], True, [0, 2]),
    ([3, 3, 3, 3], True, [3]),
    ([4], True, [4]),
  ],
)
def test_written_out(ids, merge_repeats, expected):
  packed, lengths = collapse(
    jnp.array([ids]),
    blank_id=BLANK,
    pad_id=PAD,
    merge_repeats=merge_repeats,
  )
  assert packed[0].tolist() == expected + [PAD] * (len(ids) - len(expected))
  assert lengths.tolist() == [len(expected)]


def test_merging_by_row_matches_plain_python_inside_jit():
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 4, size=(200, 12)).astype(np.int32)
  ids[rng.random(ids.shape) < 0.3] = BLANK
  merge = rng.random(200) < 0.5
  packed, lengths = jax.jit(
    lambda ids, merge: collapse(
      ids, blank_id=BLANK, pad_id=PAD, merge_repeats=merge
    )
  )(ids, merge)
  assert packed.dtype == jnp.int32
  assert lengths.dtype == jnp.int32
  for i in range(len(ids)):
    expected = reference.collapse(
      ids[i], blank_id=BLANK, pad_id=PAD, merge_repeats=merge[i]
    )
    assert packed[i, : lengths[i]].tolist() == expected
    assert np.all(packed[i, lengths[i] :] == PAD)


def test_the_example_of_the_package_runs():
  found = doctest.testmod(query_ctc)
  assert found.attempted > 5
  assert not found.failed
