"""Values that options of the commands reject."""

import math

import pytest

from narvl_jax import evaluate, predict
from narvl_jax.errors import UserError


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (math.nan, r"--min_probability=nan is not in \[0, 1\]; .*=0$"),
    (1.5, r"--min_probability=1\.5 is not in \[0, 1\]; .*=1$"),
  ],
)
def test_probabilities_are_between_0_and_1(value, message):
  with pytest.raises(UserError, match=message):
    predict.Options(min_probability=value)


@pytest.mark.parametrize("value", [math.nan, -1.0, 2.0])
def test_the_share_of_bad_records_is_between_0_and_1(value):
  with pytest.raises(UserError, match=r"--max_bad_fraction=.* is not in \[0"):
    evaluate.Options(max_bad_fraction=value)
