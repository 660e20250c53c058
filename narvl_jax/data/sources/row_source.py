"""What sources have in common whose records are rows of text files."""

import abc
import operator
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from narvl_jax.data.example import BAD_RECORD_ERRORS, TASKS, Record
from narvl_jax.data.sources import files
from narvl_jax.data.sources.rows import RowFile, RowFiles
from narvl_jax.errors import UserError, did_you_mean


class RowSource(Sequence[Record], abc.ABC):
  """Records that are rows of files; a subclass says how to read a row.

  Attributes:
    task: one of `TASKS`.
    split: such as "train".
    rows: the rows of all files.
  """

  name = ""

  def __init__(
    self, *, task: str, split: str, path: files.PathOption, index_dir: str
  ) -> None:
    """Opens the files.

    Args:
      task: one of `TASKS`.
      split: any; replaces `{split}` in `path`.
      path: see `files.resolve`.
      index_dir: see `row_index.open_index`.

    Raises:
      UserError: there is no such task or file.
    """
    if task not in TASKS:
      raise UserError(
        f'{self.name}: there is no task "{task}".{did_you_mean(task, TASKS)}'
        " Set --task, or task in the entry of data.train"
      )
    self.task, self.split = task, split
    self.rows = RowFiles(
      files.resolve(path, split, source=self.name), index_dir
    )
    # Rows that are records of this source; None: all.
    self._numbers: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.rows if self._numbers is None else self._numbers)

  @overload
  def __getitem__(self, index: int) -> Record: ...
  @overload
  def __getitem__(self, index: slice) -> Sequence[Record]: ...
  def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    file, row = self.rows.find(self._number(index))
    return self._record(file[row], file, row)

  def locate(self, index: int) -> str:
    """Returns where a record stands: "FILE row N", from row 1 on."""
    return self.rows.locate(self._number(index))

  def notes(self) -> list[str]:
    """Returns what is odd about the files, such as mixed ends of rows."""
    return list(self.rows.notes())

  def texts(self, limit: int) -> Iterator[str]:
    """Prompts, premises and answers of the first records; bad ones have none.

    For training a tokenizer.
    """
    for index in range(min(limit, len(self))):
      try:
        record = self[index]
      except BAD_RECORD_ERRORS:
        continue
      yield from filter(None, (record.prompt, record.premise))
      yield from record.answers

  @abc.abstractmethod
  def _record(self, row: bytes, file: RowFile, index: int) -> Record:
    """Reads row `index` of `file`; raises `UserError` if it is bad."""

  def _number(self, index: Any) -> int:
    """Returns the number of a record's row among all rows."""
    number = operator.index(index)
    if number < 0:
      number += len(self)
    if not 0 <= number < len(self):
      raise IndexError(f"there is no record {index} of {len(self)}")
    return number if self._numbers is None else int(self._numbers[number])
