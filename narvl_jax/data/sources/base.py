"""The base class of sources: random access to records."""

import abc
import bisect
import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, overload

from narvl_jax.data.example import Record
from narvl_jax.data.pictures.files import with_orientation


class RecordSource(Sequence[Record], abc.ABC):
  """Records by index.

  `source[i]` raises `UserError` for a bad record; `locate(i)` returns its
  place. Several threads may read a source, and it can be pickled.

  Attributes:
    exif_orientation: one of `EXIF_ORIENTATIONS`; applies to every picture.
  """

  task: str
  split: str
  exif_orientation: str = "ignore"

  @overload
  def __getitem__(self, index: int) -> Record: ...
  @overload
  def __getitem__(self, index: slice) -> Sequence[Record]: ...
  def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    record = self._read(self._number(index))
    image = with_orientation(record.image, self.exif_orientation)
    if image is record.image:
      return record
    return dataclasses.replace(record, image=image)

  def locate(self, index: int) -> str:
    """Returns where a record comes from, such as "vqa.tsv row 17"."""
    return self._place(self._number(index))

  @abc.abstractmethod
  def _read(self, number: int) -> Record:
    """Returns record `number`, which is in [0, len)."""

  def _place(self, number: int) -> str:
    return f"record {number}"

  def _number(self, index: Any) -> int:
    return checked_index(index, len(self), "record")


def checked_index(index: Any, count: int, what: str) -> int:
  """Returns an index in [0, count); negative ones count from the end."""
  number = operator.index(index)
  if number < 0:
    number += count
  if not 0 <= number < count:
    raise IndexError(f"there is no {what} {index} of {count}")
  return number


def find_part(ends: Any, number: int) -> tuple[int, int]:
  """Returns the part that item `number` is in, and its number there.

  `ends` are the cumulated lengths of the parts, ascending.
  """
  part = bisect.bisect_right(ends, number)
  return part, number - (int(ends[part - 1]) if part else 0)
