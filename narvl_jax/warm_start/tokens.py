"""Which rows of another run's embedding table mean what ours do."""

import dataclasses

import numpy as np

from narvl_jax.data.vocabulary.vocabulary import Vocabulary

# Symbols that a note shows.
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Matches:
  """Rows of two tables that mean the same.

  Attributes:
    rows: int32 [R], the row there of every row here, -1 for none.
    missing: names of the tokens here that have no row there.
    total: number of tokens here, padding left out.
    bins: coordinate bins there, where their number differs; else None.
  """

  rows: np.ndarray
  missing: tuple[str, ...]
  total: int
  bins: int | None

  def note(self) -> str:
    """Says how many tokens were found."""
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
  theirs: Vocabulary,
  ours: Vocabulary,
  *,
  classes: tuple[int, int],
  rows: int,
) -> Matches:
  """Finds the tokens of a vocabulary in another one by their names.

  Bins are places in a picture, so each is found by its place.

  Args:
    theirs: vocabulary of the other run.
    ours: of this run.
    classes: rows there and here that stand for an id; the last id, blank, is
      no class of an autoregressive model.
    rows: of our table, padding included.
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
  """Returns `Matches.rows` of tables whose first `count` rows are the same."""
  return np.where(np.arange(rows) < count, np.arange(rows), -1).astype(np.int32)


def _kinds(vocabulary: Vocabulary) -> list[str]:
  """Returns the kind of every id: a word may look like a symbol."""
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
  """Returns the id there of the bin that is nearest to one of ours."""
  if not theirs.num_bins:
    return -1
  # Bin k of n is the place k / (n - 1).
  place = (index - ours.bin_start) / max(ours.num_bins - 1, 1)
  return theirs.bin_start + round(place * (theirs.num_bins - 1))
