"""Mixtures: shares, order, epochs, hosts, changing weights."""

import collections
import itertools
import pickle
from typing import Any

import numpy as np
import pytest

from narvl_jax.data.batches import mixture
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.errors import UserError


class _Numbered(Mixture):
  """Numbers the records of all entries consecutively."""

  def __init__(self, entries: list[MixtureEntry], **settings: Any) -> None:
    super().__init__(entries, **settings)
    lengths = [0, *(len(entry.source) for entry in entries)]
    self._firsts = list(itertools.accumulate(lengths))

  def numbers(self, step: int) -> list[int]:
    return [self._firsts[d.entry] + d.index for d in self[step]]


def _mixture(
  *parts: tuple[int, Any], batch_size: int = 10, seed: int = 0, **settings: Any
) -> _Numbered:
  """Entries of (number of records, weight)."""
  entries = [
    MixtureEntry(range(count), "vqa", weight, f"entry{i}")
    for i, (count, weight) in enumerate(parts)
  ]
  return _Numbered(entries, batch_size=batch_size, seed=seed, **settings)


def _numbers(order: _Numbered, steps: int) -> list[int]:
  return list(itertools.chain(*map(order.numbers, range(steps))))


def test_each_epoch_has_every_record_once() -> None:
  numbers = _numbers(_mixture((30, 1.0)), 9)
  epochs = [numbers[i : i + 30] for i in (0, 30, 60)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(30))
  assert epochs[0] != epochs[1] != epochs[2]
  assert epochs[0] != sorted(epochs[0])


def test_order_depends_on_seed_and_name_only() -> None:
  alone = _numbers(_mixture((30, 1.0)), 3)
  assert _numbers(_mixture((30, 1.0)), 3) == alone
  assert _numbers(_mixture((30, 1.0), seed=1), 3) != alone
  both = _numbers(_mixture((30, 0.5), (70, 2.0)), 20)
  assert [n for n in both if n < 30][:30] == alone
  twins = _numbers(_mixture((50, 1.0), (50, 1.0)), 10)
  first = [n for n in twins if n < 50]
  second = [n - 50 for n in twins if n >= 50]
  assert sorted(first) == sorted(second)
  assert first != second


@pytest.mark.parametrize(
  "weights", [(1.0,), (1.0, 1.0), (0.5, 1.5, 3), (1, 1e-3), (7, 0, 3, 1, 2)]
)
def test_shares_are_kept_in_every_stretch(weights: tuple[float, ...]) -> None:
  order = _mixture(*((1000, w) for w in weights), batch_size=8)
  entries = np.asarray(_numbers(order, 60)) // 1000
  shares = np.asarray(weights) / sum(weights)
  for start in (0, 13, 200):
    for length in (8, 40, 280):
      stretch = entries[start : start + length]
      counts = np.bincount(stretch, minlength=len(weights))
      # Each of the nested roundings is off by less than one.
      assert np.abs(counts - shares * length).max() <= len(weights)
  for entry, weight in enumerate(weights):
    assert (entry in entries) == (weight > 0.01)


def test_hosts_share_the_global_batch() -> None:
  parts = ((40, ((0, 1.0), (4, 3.0))), (25, 1.0))
  together = _mixture(*parts, batch_size=12)
  for rows in ([0, 1, 2], [3, 9, 10, 11], [11], range(12)):
    part = _mixture(*parts, batch_size=12, rows=rows)
    for step in (0, 1, 3, 4, 5, 1000):
      assert part[step] == [together[step][row] for row in rows]


def test_weights_change_at_their_step() -> None:
  schedule = ((0, 1.0), (3, 0.0), (5, 4.0))
  order = _mixture((1000, schedule), (1000, 1.0))
  counts = [sum(n < 1000 for n in order.numbers(step)) for step in range(8)]
  assert counts == [5, 5, 5, 0, 0, 8, 8, 8]


def test_records_continue_without_gaps_when_weights_change() -> None:
  changing = _mixture(
    (40, ((0, 1.0), (3, 0.0), (5, 4.0), (6, 1.0))), (60, ((0, 2), (4, 1)))
  )
  constant = _mixture((40, 1.0), (60, 1.0))
  for low, high in ((0, 40), (40, 100)):
    seen = [n for n in _numbers(changing, 20) if low <= n < high]
    expected = [n for n in _numbers(constant, 40) if low <= n < high]
    assert seen == expected[: len(seen)]
    assert len(seen) > 40


def test_one_weight_is_a_schedule_of_one() -> None:
  plain = _mixture((40, 1.0), (60, 2.0))
  listed = _mixture((40, [(0, 1.0)]), (60, [[0, 2]]))
  assert _numbers(plain, 9) == _numbers(listed, 9)


@pytest.mark.parametrize("count", [1000, 2**31])
def test_large_sources(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(mixture, "_MAX_PERMUTED", 100)
  order = _mixture((7, 1.0), (count, 1.0))
  numbers = [n - 7 for n in _numbers(order, 100) if n >= 7]
  assert len(set(numbers)) == len(numbers) == 500
  assert max(numbers) < count
  assert min(numbers) >= 0
  # Spread over the source, not its head.
  assert np.mean(numbers) == pytest.approx(count / 2, rel=0.1)
  again = _mixture((7, 1.0), (count, 1.0))
  assert again[57] == order[57]
  if count == 1000:
    epoch = [n - 7 for n in _numbers(order, 400) if n >= 7]
    assert sorted(epoch[:1000]) == sorted(epoch[1000:]) == list(range(1000))
    assert epoch[:1000] != epoch[1000:]


def test_first_records_are_spread_evenly() -> None:
  counts = collections.Counter()
  for seed in range(300):
    order = _mixture((20, 1.0), seed=seed, batch_size=2)
    counts.update(order.numbers(0))
  # 600 draws from 20: 30 each, standard deviation 5.3.
  assert len(counts) == 20
  assert max(counts.values()) < 55


@pytest.mark.parametrize(
  ("weight", "message"),
  [
    (-1.0, "entry0.weight is -1.0; it must be 0 or more"),
    (float("nan"), "entry0.weight is nan"),
    (((1, 1.0),), r"starts at the steps \[1\]; they must rise from 0"),
    (((0, 1.0), (5, 2.0), (5, 1.0)), r"the steps \[0, 5, 5\]"),
    ((), r"starts at the steps \[\]"),
    (((0, 1.0), (7, 0.0)), "from step 7 on no data has a weight above 0"),
  ],
)
def test_bad_weights(weight: Any, message: str) -> None:
  with pytest.raises(UserError, match=message):
    _mixture((10, weight))


def test_bad_sizes() -> None:
  with pytest.raises(UserError, match=r"batch size 0 .*batch_size=1"):
    _mixture((10, 1.0), batch_size=0)
  with pytest.raises(UserError, match='source of "entry1" has no record'):
    _mixture((10, 1.0), (0, 1.0))
  with pytest.raises(UserError, match="the limit is 4294967296"):
    _mixture((2**32 + 1, 1.0))


def test_positions_count_the_records_of_an_entry() -> None:
  schedule = ((0, 1.0), (4, 3.0))
  order = _mixture((7, schedule), (30, 1.0))
  seen = [0, 0]
  for step in range(12):
    assert order.used(step) == seen
    for draw in order[step]:
      assert draw.position == seen[draw.entry]
      seen[draw.entry] += 1
  assert order.used(4) == [20, 20]
  assert order.used(8) == [50, 30]


@pytest.mark.parametrize(
  ("temperature", "shares"),
  [
    (0.0, (1, 1, 2)),
    (1.0, (100, 900, 200)),
    (2.0, (10, 30, 20)),
    (1e9, (1, 1, 2)),
    (1e-3, (0, 1, 0)),
  ],
)
def test_temperature(temperature: float, shares: tuple[int, ...]) -> None:
  order = _mixture(
    (100, 1.0), (900, 1.0), (100, 2.0), temperature=temperature, batch_size=6
  )
  expected = 6000 * np.asarray(shares) / sum(shares)
  np.testing.assert_allclose(order.used(1000), expected, atol=3)


def test_bad_temperature() -> None:
  for value in (-1.0, float("nan"), float("inf")):
    with pytest.raises(UserError, match=r"data.temperature is .* 0 \(off\)"):
      _mixture((10, 1.0), temperature=value)


def test_mixture_travels_to_other_processes() -> None:
  order = _mixture((30, 1.0), (50, 2.0))
  first = order[17]
  copy = pickle.loads(pickle.dumps(order))
  assert copy[17] == first


@pytest.mark.parametrize(
  ("weights", "changes"),
  [
    ([1.0, 2.0], []),
    ([((0, 1.0), (500, 1.0)), ((0, 3.0), (500, 3.0))], []),
    # The same shares by other weights.
    ([((0, 1.0), (500, 2.0)), ((0, 3.0), (500, 6.0))], []),
    ([((0, 1.0), (500, 2.0)), 1.0], [500]),
    ([((0, 0.0), (9, 1.0)), ((0, 1.0), (5, 2.0), (20, 3.0))], [9, 20]),
  ],
)
def test_steps_at_which_shares_change(weights, changes):
  assert mixture.share_changes(weights) == changes
