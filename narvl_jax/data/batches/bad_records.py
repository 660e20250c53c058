"""Bad records: the only code in which a record may fail, and their count.

Any error while a record is read, checked, decoded, augmented or tokenised makes
it a bad record, which is counted and left out. All code that reads records uses
`RecordReader`.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from narvl_jax.data import sources
from narvl_jax.data.example import Record
from narvl_jax.data.record_checks import checked_record
from narvl_jax.errors import UserError
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import warn

# Errors that damaged data raises. Others may be defects of the code.
_FORESEEN = (ValueError, OSError, LookupError, OverflowError)
# Records, spread over the source, that are tried to recognise such a defect.
_PROBED = 16
# MemoryErrors in a row that are due to the machine, not to one record.
_SHORT_OF_MEMORY = 3
# Characters that are kept at either end of a long reason, and of an id.
_REASON_PART = 200
_ID_PART = 100
# Only procedural sources exceed this.
_MOST_RECORDS = 10**8

T = TypeVar("T")


def short_reason(error: Exception) -> str:
  """Returns the message of an error as one line, shortened in the middle."""
  reason = " ".join(str(error).split())
  if not reason or not isinstance(error, _FORESEEN):
    reason = f"{type(error).__name__}: {reason}".rstrip(": ")
  if len(reason) > 2 * _REASON_PART:
    reason = f"{reason[:_REASON_PART]} ... {reason[-_REASON_PART:]}"
  return reason


@dataclasses.dataclass(frozen=True)
class BadRecord:
  """A record that could not be used; sent from worker to main process.

  Attributes:
    name: entry or data set.
    place: location, such as "vqa.tsv row 17".
    record_id: None if the record could not be read.
    kind: "" if the record could not be read.
  """

  name: str
  index: int
  total: int
  place: str
  reason: str
  record_id: str | None = None
  kind: str = ""

  @property
  def what(self) -> str:
    """Place, id and reason as text."""
    place = self.place
    if self.record_id:
      short = self.record_id[:_ID_PART]
      dots = "..." if short != self.record_id else ""
      place += f' (id "{short}{dots}")'
    return f"{place}: {self.reason}"


class RecordReader:
  """Reads and processes records of one source; thread-safe and picklable.

  Attributes:
    defect: the error that all tried records raise, if `read` found one.
  """

  def __init__(
    self,
    source: Sequence[Record],
    name: str,
    total: int | None = None,
    *,
    among: Sequence[int] | None = None,
  ) -> None:
    """Wraps a source.

    Args:
      total: number of records that are used; all of the source by default.
      among: indices of these records; the first `total` by default.
    """
    self._source = source
    self._name = name
    self._total = len(source) if total is None else total
    self._among = range(self._total) if among is None else among
    # Whether a record was processed, or failed in a way that data does.
    self._sound = False
    self.defect: Exception | None = None
    self._short_of_memory = 0

  def read(self, index: int, use: Callable[[Record], T]) -> T | BadRecord:
    """Returns `use(source[index])`, or a `BadRecord` if that fails.

    Args:
      use: processes a record. It may be called with other records of the
        source as well, to distinguish a defect of the code from bad data.

    Raises:
      Exception: the error of the record, if bad data is not known to raise it
        and all other records that are tried raise the same type.
      UserError: the machine is out of memory.
    """
    record = None
    try:
      record = self._source[index]
      value = use(checked_record(record))
    except Exception as error:
      self._check_memory(index, error)
      if isinstance(error, _FORESEEN):
        self._sound = True
      elif not self._sound and not isinstance(error, MemoryError):
        self._check_defect(index, use, error)
      return BadRecord(
        self._name,
        index,
        self._total,
        self._place(index),
        short_reason(error),
        _text_of(record, "id", None),
        _text_of(record, "kind", ""),
      )
    self._sound = True
    self._short_of_memory = 0
    return value

  def _check_defect(
    self, index: int, use: Callable[[Record], object], error: Exception
  ) -> None:
    """Raises `error` if all tried records raise the same type."""
    number = len(self._among)
    count = min(number, _PROBED)
    probed = {self._among[i * number // count] for i in range(count)}
    for other_index in sorted(probed - {index}):
      try:
        use(checked_record(self._source[other_index]))
      except Exception as other:
        if type(other) is type(error):
          continue
      self._sound = True
      return
    self.defect = error
    count = len(probed | {index})
    error.add_note(
      f"All {count} records of {self._name} that were tried raise"
      f" {type(error).__name__}, such as {self._place(index)}: a defect of the"
      " code rather than bad data"
    )
    raise error

  def _check_memory(self, index: int, error: Exception) -> None:
    if not isinstance(error, MemoryError):
      self._short_of_memory = 0
      return
    self._short_of_memory += 1
    if self._short_of_memory >= _SHORT_OF_MEMORY:
      raise UserError(
        f"there was no memory for {self._short_of_memory} records of"
        f" {self._name} in a row, the last {self._place(index)}: the machine"
        " has too little; lower --config.data.num_workers,"
        " --config.data.num_threads or --config.data.prefetch"
      ) from error

  def _place(self, index: int) -> str:
    try:
      return sources.locate(self._source, index)
    except Exception:  # A missing place must not end the run.
      return f"record {index}"


def _text_of(record: Any, name: str, default: T) -> str | T:
  """Returns a text field of a record, which may be of any type."""
  value = getattr(record, name, None)
  return value if isinstance(value, str) else default


def read_good(
  source: Sequence[Record],
  name: str,
  use: Callable[[Record], T],
  doing: str,
  max_examples: int = 0,
) -> Iterator[T]:
  """Reads a source from its first record on, with progress.

  Bad records are skipped, with one warning at the end.

  Args:
    use: makes what is yielded of a record.
    doing: what the records are read for, such as "collecting answers".
    max_examples: number of records to read; 0 reads all.

  Raises:
    UserError: the source is endless.
  """
  if not max_examples and len(source) > _MOST_RECORDS:
    raise UserError(
      f"the source makes {len(source):,} records, too many to read; set"
      " --max_examples, for example to 100000"
    )
  number = min(len(source), max_examples or len(source))
  reader = RecordReader(source, name, number)
  bad: list[BadRecord] = []
  with progress.doing(doing, number, "records") as activity:
    for index in range(number):
      found = reader.read(index, use)
      if isinstance(found, BadRecord):
        bad.append(found)
      else:
        yield found
      activity.advance()
  if bad:
    warn(
      f"{len(bad):,} of the {number:,} records are bad and were passed over,"
      f" such as {bad[0].what}"
    )


class BadRecords:
  """Counts the bad records of a run and stops it when there are too many.

  Attributes:
    max_fraction: share of the records of a source that may be bad.
  """

  def __init__(self, max_fraction: float = 0.01) -> None:
    self.max_fraction = max_fraction
    self._seen: dict[str, set[int]] = collections.defaultdict(set)
    self._lock = threading.Lock()

  @property
  def count(self) -> int:
    """Number of different bad records so far."""
    with self._lock:
      return sum(len(seen) for seen in self._seen.values())

  def count_of(self, name: str) -> int:
    """Returns the number of different bad records of one entry."""
    with self._lock:
      return len(self._seen[name])

  def indices_of(self, name: str) -> set[int]:
    """Returns the indices of the bad records of one entry."""
    with self._lock:
      return set(self._seen[name])

  def report(self, record: BadRecord) -> None:
    """Counts a bad record, and logs it the first time.

    Raises:
      UserError: more than `max_fraction` of the source is bad.
    """
    with self._lock:
      seen = self._seen[record.name]
      if record.index in seen:
        return
      seen.add(record.index)
      bad = len(seen)
    warn(f"skipped a bad record of {record.name}: {record.what}")
    if bad > self.max_fraction * record.total:
      raise UserError(
        f"{bad} of {record.total} records of {record.name} are bad, more than"
        f" {self.max_fraction:.2%}; the last is {record.what}. Correct the data"
        " or set --config.data.max_bad_fraction (evaluate: --max_bad_fraction)"
      )
