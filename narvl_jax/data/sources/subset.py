"""Some records of a source."""

from collections.abc import Sequence
from typing import Any

from narvl_jax.data import sources
from narvl_jax.data.example import Record


def spread(size: int, limit: int | None) -> Sequence[int]:
  """Returns at most `limit` indices, evenly spread over `range(size)`."""
  if limit is None or limit >= size:
    return range(size)
  return [i * size // limit for i in range(limit)]


class Subset(Sequence[Record]):
  """Some records of a source.

  Attributes:
    indices: their indices in the source.
  """

  def __init__(self, source: Sequence[Record], indices: Sequence[int]) -> None:
    self._source, self.indices = source, indices

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: Any) -> Any:
    return self._source[self.indices[index]]

  def locate(self, index: int) -> str:
    """Returns where a record comes from."""
    return sources.locate(self._source, self.indices[index])
