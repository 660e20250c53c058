"""The base class of sources whose records are rows of text files."""

import abc
import hashlib
import json

import numpy as np

from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.sources import files
from narvl_jax.data.sources.base import RecordSource
from narvl_jax.data.sources.content import CONTENT_MARK
from narvl_jax.data.sources.rows.files import RowFile, RowFiles
from narvl_jax.errors import UserError, did_you_mean


class RowSource(RecordSource):
  """Records that are rows of files; a subclass reads one row."""

  name = ""

  def __init__(
    self,
    *,
    task: str,
    split: str,
    path: files.PathOption = None,
    index_dir: str = "",
  ) -> None:
    """Opens the files.

    Args:
      split: replaces `{split}` in `path`.
      path: see `files.resolve`.
      index_dir: folder of the index of rows; see `rows.index.open_index`.

    Raises:
      UserError: there is no such task, a file cannot be read, or no row has
        the task.
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
    self._numbers = self._select_rows()

  def __len__(self) -> int:
    return len(self.rows if self._numbers is None else self._numbers)

  def _read(self, number: int) -> Record:
    file, row = self.rows.find(self._row(number))
    return self._record(file[row], file, row)

  def _place(self, number: int) -> str:
    return self.rows.locate(self._row(number))

  def notes(self) -> list[str]:
    """Returns oddities of the files, such as mixed ends of rows."""
    return list(self.rows.notes())

  def fingerprint(self) -> str:
    """Returns a text that changes with the files."""
    facts, contents = zip(*(x.identify() for x in self.rows.files), strict=True)
    before = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    after = hashlib.sha256(b"".join(contents)).hexdigest()
    return f"{before}{CONTENT_MARK}{after}"

  def _select_rows(self) -> np.ndarray | None:
    """Returns the numbers of the rows that are records; None: all rows."""
    return None

  @abc.abstractmethod
  def _record(self, row: bytes, file: RowFile, index: int) -> Record:
    """Reads row `index` of `file`; raises `UserError` if it is bad."""

  def _row(self, number: int) -> int:
    return number if self._numbers is None else int(self._numbers[number])
