"""Rows of another run's embedding table that are of the same tokens."""

import dataclasses

import numpy as np

from narvl_jax.data.vocabulary.vocabulary import Vocabulary

# Tokens that a note names.
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Matches:
  """Rows of two tables for the same tokens.

  Attributes:
    rows: int32 [R], for every row here the row there, -1 for none.
    missing: names of the tokens here that have no row there.
    total: number of tokens here, without padding.
    bins: number of coordinate bins there if it differs, otherwise None.
  """

  rows: np.ndarray
  missing: tuple[str, ...]
  total: int
  bins: int | None

  def note(self) -> str:
    """Returns how many tokens were found."""
    found = self.total - len(self.missing)
    text = f"{found:,} of {self.total:,} tokens were found there by name"
    if self.missing:
      shown = ", ".join(self.missing[:_SHOWN])
      more = ", ..." if len(self.missing) > _SHOWN else ""
      text += f", {len(self.missing):,} start fresh ({shown}{more})"
    if self.bins is not None:
      text += f", each coordinate bin is the nearest of the {self.bins:,} there"
    return text


def match_tokens(
  theirs: Vocabulary, ours: Vocabulary, *, classes: tuple[int, int], rows: int
) -> Matches:
  """Finds tokens in another vocabulary by name, and bins by position.

  Args:
    classes: number of classes there and here; the last id, the blank, is no
      class of an autoregressive model.
    rows: number of rows of our table, with padding.
  """
  known = {
    (kind, theirs.symbol(i)): i
    for i, kind in enumerate(_kinds(theirs)[: classes[0]])
  }
  found = np.full(rows, -1, np.int32)
  kinds = _kinds(ours)[: classes[1]]
  for i, kind in enumerate(kinds):
    if kind == "bin":
      found[i] = _bin(i, ours, theirs)
    else:
      found[i] = known.get((kind, ours.symbol(i)), -1)
  missing = tuple(ours.symbol(i) for i in range(len(kinds)) if found[i] < 0)
  other_bins = ours.num_bins and theirs.num_bins not in (0, ours.num_bins)
  return Matches(
    found, missing, len(kinds), theirs.num_bins if other_bins else None
  )


def same_ids(rows: int, count: int) -> np.ndarray:
  """Returns `Matches.rows` of tables with `count` common first rows."""
  return np.where(np.arange(rows) < count, np.arange(rows), -1).astype(np.int32)


def _kinds(vocabulary: Vocabulary) -> list[str]:
  """Returns the kind of every id; a word may be spelled like a symbol."""
  kinds = ["word"] * vocabulary.size
  kinds[:4] = ["special"] * 4
  kinds[vocabulary.mask_id] = "special"
  kinds[vocabulary.blank_id] = "special"
  for i in range(vocabulary.code_start, vocabulary.bin_start):
    kinds[i] = "code"
  for i in range(vocabulary.bin_start, vocabulary.blank_id):
    kinds[i] = "bin"
  return kinds


def _bin(index: int, ours: Vocabulary, theirs: Vocabulary) -> int:
  """Returns the id there of the nearest bin, -1 without any."""
  if not theirs.num_bins:
    return -1
  # Bin k of n is the position k / (n - 1).
  place = (index - ours.bin_start) / max(ours.num_bins - 1, 1)
  return theirs.bin_start + round(place * (theirs.num_bins - 1))
