"""Confidence intervals: coverage by simulation, pairs, groups."""

import numpy as np
import pytest

from narvl_jax.metrics import bootstrap


@pytest.mark.parametrize("per_group", [1, 4])
def test_intervals_cover(per_group):
  """About 95 % of the intervals hold the true mean.

  Examples of one group share a part of their value, so that an interval that
  took them for independent would be too narrow.
  """
  rng = np.random.default_rng(0)
  groups = np.repeat(np.arange(80), per_group)
  covered = 0
  for seed in range(200):
    shared = rng.normal(size=80)[groups]
    values = 0.3 + shared + rng.normal(size=len(groups))
    found = bootstrap.interval(
      bootstrap.with_counts(values), groups.tolist(), draws=200, seed=seed
    )
    covered += found.low <= 0.3 <= found.high
  assert 178 <= covered <= 199


def test_independent_examples_would_be_too_narrow():
  values = np.repeat(np.random.default_rng(0).normal(size=50), 8)
  groups = np.repeat(np.arange(50), 8).tolist()
  statistics = bootstrap.with_counts(values)
  grouped = bootstrap.interval(statistics, groups)
  alone = bootstrap.interval(statistics, list(range(400)))
  assert grouped.value == alone.value
  assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_the_same_seed_gives_the_same_interval():
  statistics = bootstrap.with_counts(np.arange(20.0))
  one, same, other = (
    bootstrap.interval(statistics, range(20), seed=seed) for seed in (1, 1, 2)
  )
  assert one == same != other


def test_pairs():
  rng = np.random.default_rng(0)
  hard = rng.normal(size=400)
  first = bootstrap.with_counts(hard + 0.1 + 0.1 * rng.normal(size=400))
  second = bootstrap.with_counts(hard + 0.1 * rng.normal(size=400))
  found = bootstrap.paired_difference(first, second, range(400))
  assert 0 < found.low < found.value < found.high < 0.2
  assert found.p_value == pytest.approx(2 / 1001)
  # Unpaired intervals overlap widely.
  assert bootstrap.interval(first, range(400)).low < 0
  same = bootstrap.paired_difference(first, first, range(400))
  assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(("count", "least"), [(1, 1), (2, 0.5), (5, 1 / 16)])
def test_few_pictures_show_no_difference(count, least):
  """The exact test by signs of n pictures reaches 2^(1 - n) at best."""
  right, wrong = (
    bootstrap.with_counts(np.concatenate([x, np.ones(50)]))
    for x in (np.ones(count), np.zeros(count))
  )
  found = bootstrap.paired_difference(right, wrong, range(count + 50))
  assert found.p_value >= least
  alone = bootstrap.paired_difference(
    right[:count], wrong[:count], range(count)
  )
  assert (alone.value, alone.p_value) == (1, least)


def test_the_p_value_is_uniform_without_a_difference():
  rng = np.random.default_rng(1)
  found = [
    bootstrap.paired_difference(
      bootstrap.with_counts(rng.normal(size=60)),
      bootstrap.with_counts(rng.normal(size=60)),
      range(60),
      draws=200,
    ).p_value
    for _ in range(200)
  ]
  assert 2 <= sum(p < 0.05 for p in found) <= 24


def test_a_figure_without_examples_in_a_draw():
  """A class that a draw lacks gives no figure; the others count."""
  statistics = np.zeros((30, 2))
  statistics[0] = [1, 1]
  found = bootstrap.interval(statistics, range(30))
  # One picture shows little.
  assert (found.value, found.high) == (1, 1)
  assert found.low == pytest.approx(0.2065, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_shares_have_the_interval_of_wilson(value):
  """Wilson's bound of 50 of 50 is 0.9287 at a level of 95 %."""
  statistics = bootstrap.with_counts(np.full(100, value))
  # Two examples of each picture.
  found = bootstrap.interval(statistics, [i // 2 for i in range(100)])
  bounds = (0.9287, 1) if value else (0, 1 - 0.9287)
  assert (found.low, found.high) == pytest.approx(bounds, abs=1e-4)
  # Other equal values are not shares.
  many = bootstrap.interval(bootstrap.with_counts(np.full(9, 3.0)), range(9))
  assert (many.low, many.high) == (3, 3)


def test_mistakes():
  with pytest.raises(ValueError, match="no examples"):
    bootstrap.interval(np.zeros((0, 2)), [])
  with pytest.raises(ValueError, match="2 examples against 3"):
    bootstrap.paired_difference(np.zeros((2, 2)), np.zeros((3, 2)), [0, 1])
