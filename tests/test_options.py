"""Values that options of the commands reject."""

import math

import pytest

from narvl_jax import evaluate, predict
from narvl_jax.errors import UserError
from narvl_jax.evaluation import distillation


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
  message = r"--max_bad_fraction=.* is not in \[0"
  with pytest.raises(UserError, match=message):
    evaluate.Options(max_bad_fraction=value)
  with pytest.raises(UserError, match=message):
    distillation.Options("teacher", "to", max_bad_fraction=value)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"batch_size": "4"},
      "^batch_size='4' is str, not a whole number; .* batch_size=4$",
    ),
    ({"batch_size": 4.0}, r"^batch_size=4\.0 is float, not a whole number$"),
    ({"max_bad_fraction": "0.1"}, "='0.1' is str, not a number; .*=0.1$"),
  ],
)
def test_numbers_are_numbers(options, message):
  with pytest.raises(UserError, match=message):
    evaluate.Options(**options)
