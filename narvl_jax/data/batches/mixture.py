"""The order of records: a mixture of sources as a function of position."""

import bisect
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from narvl_jax.data.batches.entry import MixtureEntry, WeightSchedule
from narvl_jax.errors import UserError

# Weights are rounded to this many parts of their sum.
_PARTS = 1_000_000
# Largest source whose permutation of an epoch is held in memory.
_MAX_PERMUTED = 1 << 24
# Largest source that grain can shuffle.
_MAX_SHUFFLED = 1 << 32


class Draw(NamedTuple):
  """One row of a batch.

  Attributes:
    position: number of records of the entry before it, over all epochs.
  """

  entry: int
  index: int
  position: int


class Mixture:
  """Index of a batch -> its draws; an endless sequence for grain.

  Entries are interleaved evenly: in any stretch of the sequence the number of
  records of an entry is proportional to its weight, to within two records.
  Every epoch of an entry has each of its records once, also across changes of
  weight, in an order that depends only on the seed, the epoch and the entry's
  name.
  """

  def __init__(
    self,
    entries: Sequence[MixtureEntry],
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    temperature: float = 0.0,
  ) -> None:
    """Builds the mixture.

    Args:
      batch_size: examples of all hosts together.
      rows: rows of every global batch that this host makes; all by default.
      temperature: T multiplies every weight by (number of records) ** (1 / T).
        At 1 shares are proportional to the sizes of the sources; larger values
        make them more even; 0 leaves the weights unchanged.

    Raises:
      UserError: weights, temperature, sources or batch size are invalid.
    """
    if batch_size < 1:
      raise UserError(
        f"batch size {batch_size} is below 1; set --config.train.batch_size=1"
      )
    self.entries = entries
    self.seed = seed
    self._batch_size = batch_size
    self._rows = range(batch_size) if rows is None else list(rows)
    self._orders = [_order(entry, seed) for entry in entries]
    factors = _size_factors(entries, temperature)
    schedules = [
      [(step, x * factor) for step, x in parse_weight(entry.name, entry.weight)]
      for entry, factor in zip(entries, factors, strict=True)
    ]
    steps = sorted({step for schedule in schedules for step, _ in schedule})
    self._starts = [step * batch_size for step in steps]
    self._parts = [_parts(schedules, entries, step) for step in steps]
    # Records of each entry that earlier phases use. Weights change only
    # between batches, and a phase is a stretch of constant weights.
    self._used = [[0] * len(entries)]
    for i in range(1, len(steps)):
      length = self._starts[i] - self._starts[i - 1]
      counts = _counts(length, self._parts[i - 1])
      before = self._used[-1]
      self._used.append([a + b for a, b in zip(before, counts, strict=True)])

  def __len__(self) -> int:
    return 1 << 48  # Endless; grain needs a number.

  def __getitem__(self, index: int) -> list[Draw]:
    return self._draws(index, self._rows)

  def whole(self, index: int) -> list[Draw]:
    """Returns the draws of a batch for all hosts."""
    return self._draws(index, range(self._batch_size))

  def _draws(self, index: int, rows: Sequence[int]) -> list[Draw]:
    first = index * self._batch_size
    phase = self._phase(first)
    start, used = self._starts[phase], self._used[phase]
    draws = []
    for row in rows:
      entry, key = _locate(first - start + row, self._parts[phase])
      position = used[entry] + key
      draws.append(Draw(entry, int(self._orders[entry][position]), position))
    return draws

  def used(self, step: int) -> list[int]:
    """Returns the number of records of each entry in the first batches."""
    first = step * self._batch_size
    phase = self._phase(first)
    counts = _counts(first - self._starts[phase], self._parts[phase])
    return [a + b for a, b in zip(self._used[phase], counts, strict=True)]

  def _phase(self, position: int) -> int:
    # A phase begins with a batch, so all rows of a batch are in one phase.
    return bisect.bisect_right(self._starts, position) - 1


class _Permutations:
  """Position -> record number: a new permutation in every epoch."""

  def __init__(self, count: int, words: Sequence[int]) -> None:
    self._count = count
    self._words = tuple(words)
    self._clear_cache()

  def __getitem__(self, position: int) -> int:
    epoch, i = divmod(position, self._count)
    return int(self._epoch(epoch)[i])

  def _clear_cache(self) -> None:
    # Two epochs: some threads may be in the next one already.
    self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

  def __getstate__(self) -> tuple[int, tuple[int, ...]]:
    # Other processes compute permutations themselves.
    return self._count, self._words

  def __setstate__(self, state: tuple[int, tuple[int, ...]]) -> None:
    self._count, self._words = state
    self._clear_cache()

  def _permutation(self, epoch: int) -> np.ndarray:
    rng = np.random.default_rng([*self._words, epoch])
    return rng.permutation(np.arange(self._count, dtype=np.int32))


def _order(entry: MixtureEntry, seed: int) -> Any:
  """Returns the endless order of an entry's record numbers."""
  count = len(entry.source)
  if count < 1:
    raise UserError(
      f'the source of "{entry.name}" has no record; check'
      f" --config.data.train.{entry.name}"
    )
  words = [seed % 2**32, zlib.crc32(entry.name.encode())]
  if count <= _MAX_PERMUTED:
    return _Permutations(count, words)
  if count > _MAX_SHUFFLED:
    raise UserError(
      f'the source of "{entry.name}" has {count} records; the limit is'
      f" {_MAX_SHUFFLED}: split --config.data.train.{entry.name}"
    )
  # Needs no memory, but takes more time than all other code in this module.
  own_seed = int(np.random.SeedSequence(words).generate_state(1)[0])
  return grain.MapDataset.range(count).shuffle(seed=own_seed).repeat(None)


def share_changes(weights: Sequence[WeightSchedule]) -> list[int]:
  """Returns the positions of the batches at which shares change."""
  schedules = [
    [(0, weight)] if isinstance(weight, int | float) else list(weight)
    for weight in weights
  ]
  changes, before = [], None
  for step in sorted({step for schedule in schedules for step, _ in schedule}):
    at_step = [_weight_at(schedule, step) for schedule in schedules]
    shares = [weight / sum(at_step) for weight in at_step]
    if before is not None and not np.allclose(shares, before):
      changes.append(step)
    before = shares
  return changes


def _weight_at(schedule: Sequence[tuple[int, float]], step: int) -> float:
  return next(value for start, value in reversed(schedule) if start <= step)


def _size_factors(
  entries: Sequence[MixtureEntry], temperature: float
) -> list[float]:
  """Returns the factors of the weights; that of the largest source is 1."""
  if not math.isfinite(temperature) or temperature < 0:
    raise UserError(
      f"data.temperature is {temperature}; it must be 0 (off) or more:"
      " --config.data.temperature=0"
    )
  if not temperature:
    return [1.0] * len(entries)
  largest = max(len(entry.source) for entry in entries)
  return [(len(e.source) / largest) ** (1 / temperature) for e in entries]


def parse_weight(name: str, weight: Any) -> list[tuple[int, float]]:
  """Returns the weight of an entry as [(from_step, weight), ...].

  Raises:
    UserError: the weight is neither, negative or not finite.
  """
  flag = f"--config.data.train.{name}.weight"
  if _is_number(weight):
    weight = ((0, weight),)
  if not isinstance(weight, (tuple, list)) or not all(map(_is_phase, weight)):
    raise UserError(
      f"{flag} is {weight!r}; it must be a number such as 2.0, or pairs of a"
      " step and the weight from there on, such as ((0, 1.0), (1000, 0.5))"
    )
  steps = [step for step, _ in weight]
  if not steps or steps[0] != 0 or steps != sorted(set(steps)):
    raise UserError(
      f"{flag} starts at the steps {steps}; they must rise from 0, as in"
      " ((0, 1.0), (1000, 0.5))"
    )
  for _, value in weight:
    if not math.isfinite(value) or value < 0:
      raise UserError(f"{flag} is {value}; it must be 0 or more")
  return [(step, float(value)) for step, value in weight]


def _is_phase(pair: Any) -> bool:
  return (
    isinstance(pair, (tuple, list))
    and len(pair) == 2
    and _is_number(pair[0])
    and pair[0] == int(pair[0] if math.isfinite(pair[0]) else 0)
    and _is_number(pair[1])
  )


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parts(
  schedules: Sequence[Sequence[tuple[int, float]]],
  entries: Sequence[MixtureEntry],
  step: int,
) -> list[int]:
  """Returns the weights at a step as integers."""
  weights = [_weight_at(schedule, step) for schedule in schedules]
  total = sum(weights)
  if total <= 0:
    names = ", ".join(entry.name for entry in entries)
    raise UserError(
      f"from step {step} on no data has a weight above 0; set"
      f" --config.data.train.NAME.weight of one of: {names}"
    )
  return [math.ceil(weight / total * _PARTS) for weight in weights]


def _counts(position: int, parts: Sequence[int]) -> list[int]:
  """Returns the number of each entry's records among the first `position`.

  Each entry in turn receives its share of the remaining positions.
  Integer arithmetic keeps every count monotone and the sum exact.
  """
  counts = []
  left, rest = position, sum(parts)
  for part in parts:
    kept = left * (rest - part) // rest if rest else 0
    counts.append(left - kept)
    left, rest = kept, rest - part
  return counts


def _locate(position: int, parts: Sequence[int]) -> tuple[int, int]:
  """Returns the entry at `position` and its number within the entry."""
  left, after, rest = position, position + 1, sum(parts)
  for entry, part in enumerate(parts):
    if not part:
      continue
    kept = left * (rest - part) // rest
    kept_after = after * (rest - part) // rest
    if after - kept_after > left - kept:
      return entry, left - kept
    left, after, rest = kept, kept_after, rest - part
  raise AssertionError(f"no entry at {position} of {parts}")
