"""Which checkpoints are kept, and why."""

import math

import pytest

from narvl_jax.checkpointing.retention import Retention, ranked

_STEPS = [1, 2, 3, 4, 5, 6]
_SCORES = {1: 0.5, 2: 0.9, 3: math.nan, 4: 0.9, 6: None}


@pytest.mark.parametrize(
  ("retention", "kept"),
  [
    (Retention(last=1, best=0), {6: ["last"]}),
    (Retention(last=9, best=0), {step: ["last"] for step in _STEPS}),
    # The later of two equal scores, and none without a score.
    (Retention(last=1, best=1), {4: ["best"], 6: ["last"]}),
    (
      Retention(last=2, best=9),
      {1: ["best"], 2: ["best"], 4: ["best"], 5: ["last"], 6: ["last"]},
    ),
    (
      Retention(last=1, best=0, every=3),
      {3: ["every 3"], 6: ["last", "every 3"]},
    ),
    (
      Retention(last=3, best=1, every=4),
      {4: ["last", "best", "every 4"], 5: ["last"], 6: ["last"]},
    ),
  ],
)
def test_reasons(retention, kept):
  found = retention.reasons(reversed(_STEPS), _SCORES)
  assert list(found) == _STEPS
  assert {step: why for step, why in found.items() if why} == kept


def test_ranked():
  assert ranked(_STEPS, _SCORES) == [4, 2, 1]
  assert ranked([], {}) == []
