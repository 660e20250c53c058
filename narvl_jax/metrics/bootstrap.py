"""Bootstrap confidence intervals of figures over examples.

Examples of one picture are not independent, so pictures are drawn with all of
their examples. A figure is a function of sums over examples, such as a mean or
a corpus BLEU, so that all draws cost one matrix product.

Percentile method: B. Efron, R. Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13. Where all examples are right, or all are wrong, every draw
equals the sample, and the interval is that of E. B. Wilson (JASA 22, 1927,
209-212) for a share of independent pictures.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple, TypeVar

import numpy as np

DRAWS = 1000
_SEED = 0
# Draws in memory at a time; they need pictures x this x 4 bytes.
_DRAWS_AT_ONCE = 50

K = TypeVar("K", bound=Hashable)
# Sums over examples, float [..., k] -> figures, float [...].
Figure = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Interval:
  """A figure and the bounds of its confidence interval."""

  value: float
  low: float
  high: float


def mean(sums: np.ndarray) -> np.ndarray:
  """A `Figure`: the first of two sums over the second, the examples."""
  with np.errstate(divide="ignore", invalid="ignore"):
    return sums[..., 0] / sums[..., 1]


def with_counts(values: Any) -> np.ndarray:
  """Returns the statistics of `mean`: [examples] -> [examples, 2]."""
  values = np.asarray(values, np.float64)
  return np.stack([values, np.ones_like(values)], -1)


def interval(
  statistics: np.ndarray,
  groups: Sequence[Hashable],
  figure: Figure = mean,
  *,
  level: float = 0.95,
  draws: int = DRAWS,
  seed: int = _SEED,
) -> Interval:
  """Returns the percentile interval of a figure, or Wilson's at 0 and 1.

  Args:
    statistics: [examples, k], whose sums are the input of the figure.
    groups: picture of each example.
    figure: function from sums to the figure.
    level: level of the interval.
    draws: number of resamplings.
    seed: seed of the draws. The same seed and pictures give the same draws.

  Raises:
    ValueError: there are no examples.
  """
  sample = Sample(statistics, groups, figure)
  return intervals({0: sample}, level=level, draws=draws, seed=seed)[0]


class Sample(NamedTuple):
  """Statistics of a figure's examples.

  Attributes:
    statistics: [examples, k], whose sums are the input of the figure.
    groups: picture of each example.
    figure: function from sums to the figure.
  """

  statistics: np.ndarray
  groups: Sequence[Hashable]
  figure: Figure = mean


def intervals(
  figures: Mapping[K, Sample],
  *,
  level: float = 0.95,
  draws: int = DRAWS,
  seed: int = _SEED,
) -> dict[K, Interval]:
  """Returns the intervals of several figures, which share their draws.

  Pictures of all figures are drawn together. A figure of some examples uses
  those of them that are drawn.

  Args:
    figures: key -> its examples.
    level: see `interval`.
    draws: see `interval`.
    seed: see `interval`.

  Raises:
    ValueError: a figure has no examples.
  """
  if not figures:
    return {}
  numbers: dict[Hashable, int] = {}
  for sample in figures.values():
    for group in sample.groups:
      numbers.setdefault(group, len(numbers))
  parts = [_grouped(x.statistics, x.groups, numbers) for x in figures.values()]
  ends = np.cumsum([x.shape[1] for x in parts])[:-1]

  def compute(sums: np.ndarray) -> np.ndarray:
    pairs = zip(figures.values(), np.split(sums, ends, -1), strict=True)
    return np.stack([sample.figure(part) for sample, part in pairs], -1)

  sums = np.concatenate(parts, -1)
  values = compute(sums.sum(0))
  drawn = _drawn(sums, compute, draws, seed)
  found = {}
  for i, (name, sample) in enumerate(figures.items()):
    value, bounds = float(values[i]), _percentiles(drawn[:, i], level)
    if value in (0, 1) and bounds == (value, value):
      count = int(np.sum(~np.isnan(sample.figure(parts[i]))))
      bounds = _wilson(value, count, level)
    found[name] = Interval(value, *bounds)
  return found


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
  """A difference of two systems with its interval.

  Attributes:
    p_value: two-sided probability of a difference at least this large if the
      systems are equal; at least 2 / (draws + 1).
  """

  p_value: float


def paired_difference(
  first: np.ndarray,
  second: np.ndarray,
  groups: Sequence[Hashable],
  figure: Figure = mean,
  *,
  level: float = 0.95,
  draws: int = DRAWS,
  seed: int = _SEED,
) -> Difference:
  """Returns figure(first) - figure(second) with a paired bootstrap.

  Both systems are resampled with the same pictures (Koehn 2004).

  Args:
    first: [examples, k] statistics of one system.
    second: those of the other on the same examples in the same order.
    groups: picture of each example.
    figure: see `interval`, as the others.
    level: see `interval`.
    draws: see `interval`.
    seed: see `interval`.

  Raises:
    ValueError: there are no examples, or not as many of both.
  """
  if len(first) != len(second):
    raise ValueError(f"{len(first)} examples against {len(second)}")
  numbers: dict[Hashable, int] = {}
  for group in groups:
    numbers.setdefault(group, len(numbers))
  one, other = (_grouped(x, groups, numbers) for x in (first, second))
  value = float(figure(one.sum(0)) - figure(other.sum(0)))
  drawn = _drawn(one, figure, draws, seed) - _drawn(other, figure, draws, seed)
  low, high = _percentiles(drawn, level)
  tail = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
  p_value = min(1.0, 2 * (int(tail) + 1) / (draws + 1))
  # The least that flipping signs of the pictures that differ can give: one or
  # two pictures show nothing, however often they are drawn.
  different = int((one != other).any(-1).sum())
  p_value = max(p_value, min(1.0, 2.0 ** (1 - different)))
  return Difference(value, low, high, p_value)


def _grouped(
  statistics: np.ndarray,
  groups: Sequence[Hashable],
  numbers: Mapping[Hashable, int],
) -> np.ndarray:
  """Returns sums over the examples of each numbered picture: [pictures, k]."""
  statistics = np.asarray(statistics, np.float64)
  if len(statistics) != len(groups):
    raise ValueError(f"{len(statistics)} examples of {len(groups)} groups")
  if not len(statistics):
    raise ValueError("a figure of no examples has no interval")
  index = [numbers[group] for group in groups]
  columns = [np.bincount(index, x, len(numbers)) for x in statistics.T]
  return np.stack(columns, -1)


def _drawn(
  sums: np.ndarray, figure: Figure, draws: int, seed: int
) -> np.ndarray:
  """Returns the figure of every resampling: [draws]."""
  rng = np.random.default_rng(seed)
  count = len(sums)
  results = []
  for first in range(0, draws, _DRAWS_AT_ONCE):
    size = min(_DRAWS_AT_ONCE, draws - first)
    times = np.empty((size, count))
    for row in times:
      row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    # Not `@`: the threads of its library cost more than they save.
    results.append(figure(np.einsum("dp,pk->dk", times, sums)))
  return np.concatenate(results)


def _wilson(share: float, count: int, level: float) -> tuple[float, float]:
  """Returns the bounds of a share of `count` independent pictures."""
  z = NormalDist().inv_cdf((1 + level) / 2)
  scale = 1 + z**2 / count
  center = (share + z**2 / (2 * count)) / scale
  variance = share * (1 - share) / count + z**2 / (4 * count**2)
  half = z * math.sqrt(variance) / scale
  return max(center - half, 0.0), min(center + half, 1.0)


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
  # A resampling without any example of a class has no figure.
  drawn = drawn[~np.isnan(drawn)]
  if not len(drawn):
    return float("nan"), float("nan")
  tail = 50 * (1 - level)
  low, high = np.percentile(drawn, [tail, 100 - tail])
  return float(low), float(high)
