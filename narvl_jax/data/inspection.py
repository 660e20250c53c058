"""Figures of a data set: what a run with given limits would make of it."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from narvl_jax.data import images, sources
from narvl_jax.data.answer_text import normalized_answers
from narvl_jax.data.bad_records import BadRecord, RecordReader
from narvl_jax.data.example import Record
from narvl_jax.data.tasks import Task, make_task
from narvl_jax.data.tasks.base import required_queries
from narvl_jax.errors import UserError

_CHUNK = 64
# Kept of what may be long: bad rows, answers told apart, repeated ids.
_MAX_BAD_ROWS = 10
_MAX_ANSWERS = 200_000
_MAX_REPEATED = 3
# Records that may be read; each costs 16 bytes until the end.
_MAX_READ = 50_000_000
_WORD_LIMITS = ("max_source_words", "max_target_words")
# What differs between messages of one kind.
_VARIABLE = re.compile(
  r"""\([^()]*\)|"[^"]*"|(?<!\w)b?'[^']*'|(?<!\w)\d[\d.,]*"""
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the records are held against.

  Attributes:
    image_size: (height, width) in pixels that the model gets.
    max_text_length: tokens of the prompt with bos and eos.
    max_label_length: labels of the target.
    num_queries: N of the model.
    max_text_positions: tokens that the model has positions for.
    max_bad_fraction: share of bad records that stops a run.
  """

  image_size: tuple[int, int] = (480, 480)
  max_text_length: int = 80
  max_label_length: int = 20
  num_queries: int = 20
  max_text_positions: int = 1026
  max_bad_fraction: float = 0.01


class _Finding(NamedTuple):
  """What one record is like."""

  index: int
  id_hash: int = 0
  error: str = ""
  record_id: str = "?"
  text_tokens: int = 0
  labels: int = 0
  queries: int = 0
  source_cut: bool = False
  target_cut: bool = False
  answer: str | None = None
  # How the answers of a question were read, and how many there are.
  answers_read: str = ""
  answers: int = 0
  kind: str = ""
  image_size: tuple[int, int] | None = None
  image_bytes: int = 0
  box: tuple[float, ...] | None = None


def inspect(
  source: Sequence[Record],
  task: Task[Any],
  limits: Limits,
  *,
  max_examples: int = 2000,
  all_texts: bool = False,
  num_threads: int = 2,
) -> dict[str, Any]:
  """Reads records and returns their figures.

  Args:
    source: the records.
    task: reads them; with a vocabulary.
    limits: of the run.
    max_examples: records that are read whole, evenly spread; 0: all.
    all_texts: reads the texts of all records, and pictures only of the
      `max_examples`.
    num_threads: threads that read.

  Raises:
    UserError: there are too many records to read all.

  Returns:
    What JSON can hold; `samples` are indices of good records with a picture.
  """
  total = len(source)
  count = min(total, max_examples) if max_examples else total
  whole = _spread_indices(total, count)
  indices = range(total) if all_texts else whole
  if len(indices) > _MAX_READ:
    raise UserError(
      f"{len(indices):,} records are too many to read all of them; the limit is"
      f" {_MAX_READ:,}: set --max_examples to a few thousand, without --all"
    )
  reader = _Reader(source, task, frozenset(whole) if all_texts else None)
  collector = _Collector(task, limits)
  chunks = (indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK))
  for findings in _in_threads(reader, chunks, num_threads):
    for finding in findings:
      collector.add(finding)
  figures = {
    "records": total,
    "read": len(indices),
    "pictures_read": count,
    "limits": dataclasses.asdict(limits),
    **collector.figures(source),
  }
  notes: Any = getattr(source, "notes", list)
  figures["notes"] = list(notes())
  return figures


def _spread_indices(total: int, count: int) -> Sequence[int]:
  if count == total:
    return range(total)
  return [i * total // count for i in range(count)]


def _in_threads(
  function: Any, items: Iterator[Any], num_threads: int
) -> Iterator[Any]:
  """Maps in order, with few items at a time in memory."""
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    waiting: collections.deque[Any] = collections.deque()
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) >= 4 * num_threads:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


class _Reader:
  """Indices -> findings."""

  def __init__(
    self,
    source: Sequence[Record],
    task: Task[Any],
    whole: frozenset[int] | None,
  ) -> None:
    """Reads pictures of `whole` only; None: of all."""
    self._records = RecordReader(source, task.name)
    self._task, self._whole = task, whole
    settings = dataclasses.asdict(task.settings)
    unlimited = {key: 0 for key in _WORD_LIMITS if settings.get(key)}
    self._uncut = None
    if unlimited:
      settings.update(unlimited)
      self._uncut = make_task(task.name, task.vocabulary, settings)

  def __call__(self, indices: Sequence[int]) -> list[_Finding]:
    return [self._read(index) for index in indices]

  def _read(self, index: int) -> _Finding:
    found = self._records.read(index, functools.partial(self._finding, index))
    if not isinstance(found, BadRecord):
      return found
    if found.record_id is None:
      return _Finding(index, error=found.reason)
    return _Finding(
      index,
      _hash(found.record_id),
      found.reason,
      found.record_id,
      kind=found.kind,
    )

  def _finding(self, index: int, record: Record) -> _Finding:
    has_target = bool(record.answers) or record.box is not None
    encoded = self._task.encode(record, with_target=has_target)
    uncut = encoded
    if self._uncut is not None:
      uncut = self._uncut.encode(record, with_target=has_target)
    size = None
    if self._whole is None or index in self._whole:
      size = images.original_size(record.image)
      # As small as possible: only the decoding may fail.
      images.prepare_image(record.image, (1, 1))
    encoded_bytes = isinstance(record.image, bytes)
    return _Finding(
      index,
      _hash(record.id),
      record_id=record.id,
      text_tokens=len(encoded.text_ids),
      labels=len(encoded.label_ids),
      queries=required_queries(encoded.label_ids),
      source_cut=encoded.text_ids != uncut.text_ids,
      target_cut=encoded.label_ids != uncut.label_ids,
      answer=_best(record),
      answers_read=_how_read(record),
      answers=record.annotators or len(record.answers),
      kind=record.kind,
      image_size=size,
      image_bytes=len(record.image) if size and encoded_bytes else 0,
      box=record.box,
    )


def _hash(text: str) -> int:
  digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8)
  return int.from_bytes(digest.digest(), "little")


def _id_of(found: str | BadRecord) -> str:
  return "?" if isinstance(found, BadRecord) else found


def _best(record: Record) -> str | None:
  answers = normalized_answers(record.answers)
  return max(answers, key=answers.__getitem__) if answers else None


def _how_read(record: Record) -> str:
  """Returns the key of `answers_read` that a question counts for."""
  if record.task != "vqa" or not record.answers:
    return ""
  if record.annotators:
    return "annotators"
  if any(score < 1 for score in record.answers.values()):
    return "scored"
  return "several" if len(record.answers) > 1 else "one"


class _Collector:
  """Adds up findings; its size does not depend on the pictures."""

  def __init__(self, task: Task[Any], limits: Limits) -> None:
    self._limits = limits
    self._has_boxes = task.name == "grounding"
    # Of every record read: for repeated ids.
    self._hashes, self._hashed = array("Q"), array("Q")
    self._bad_rows: list[tuple[int, str, str]] = []
    self._good: list[int] = []
    self._counts: collections.Counter[str] = collections.Counter()
    self._lengths = {
      name: collections.Counter() for name in ("text", "labels", "queries")
    }
    self._reasons: collections.Counter[str] = collections.Counter()
    self._answers: collections.Counter[str] = collections.Counter()
    # (how read, number of answers) -> questions.
    self._read: collections.Counter[tuple[str, int]] = collections.Counter()
    self._kinds: collections.Counter[str] = collections.Counter()
    self._widths, self._heights = array("L"), array("L")
    self._bytes = array("L")
    self._areas = array("d")

  def add(self, finding: _Finding) -> None:
    """Takes note of one record."""
    if finding.id_hash:
      self._hashes.append(finding.id_hash)
      self._hashed.append(finding.index)
    if finding.kind:
      self._kinds[finding.kind] += 1
    if finding.error:
      self._add_bad(finding)
      return
    counts, limits = self._counts, self._limits
    self._lengths["text"][finding.text_tokens] += 1
    counts["text_too_long"] += finding.text_tokens > limits.max_text_length
    counts["source_cut"] += finding.source_cut
    if finding.labels:
      counts["with_target"] += 1
      self._lengths["labels"][finding.labels] += 1
      self._lengths["queries"][finding.queries] += 1
      counts["labels_too_long"] += finding.labels > limits.max_label_length
      counts["infeasible"] += finding.queries > limits.num_queries
      counts["target_cut"] += finding.target_cut
    else:
      counts["without_target"] += 1
    if finding.answer is not None and len(self._answers) < _MAX_ANSWERS:
      self._answers[finding.answer] += 1
    if finding.answers_read:
      self._read[finding.answers_read, finding.answers] += 1
    if finding.image_size:
      self._good.append(finding.index)
      self._widths.append(finding.image_size[0])
      self._heights.append(finding.image_size[1])
      if finding.image_bytes:
        self._bytes.append(finding.image_bytes)
      if finding.box is not None and self._has_boxes:
        self._add_box(finding.box, finding.image_size)

  def _add_bad(self, finding: _Finding) -> None:
    self._counts["bad"] += 1
    self._reasons[_VARIABLE.sub("...", finding.error)[:120]] += 1
    if len(self._bad_rows) < _MAX_BAD_ROWS:
      self._bad_rows.append((finding.index, finding.record_id, finding.error))

  def _add_box(self, box: Sequence[float], size: tuple[int, int]) -> None:
    x0, y0, x1, y1 = box
    self._areas.append((x1 - x0) * (y1 - y0) / (size[0] * size[1]))
    # A picture of one pixel apart, pixels reach beyond 1.
    self._counts["boxes_of_fractions"] += max(box) <= 1 < min(size)

  def figures(self, source: Sequence[Record]) -> dict[str, Any]:
    """Returns what `inspect` reports of the records read."""
    counts = self._counts
    answered = sum(self._answers.values())
    names = (
      *("bad", "with_target", "without_target", "text_too_long", "source_cut"),
      *("labels_too_long", "infeasible", "target_cut", "boxes_of_fractions"),
    )
    return {
      **{name: counts[name] for name in names},
      "boxes": len(self._areas),
      "reasons": dict(self._reasons.most_common(_MAX_BAD_ROWS)),
      "bad_rows": [
        {"index": i, "place": sources.locate(source, i), "id": j, "error": e}
        for i, j, e in self._bad_rows
      ],
      "repeated_ids": self._repeated_ids(source),
      "lengths": {
        name: {str(k): lengths[k] for k in sorted(lengths)}
        for name, lengths in self._lengths.items()
      },
      "answers": {
        "different": len(self._answers),
        "of": answered,
        "most_common": dict(self._answers.most_common(8)),
      },
      "answers_read": self._answers_read(),
      "kinds": dict(self._kinds.most_common(12)),
      "pictures": {
        "width": _spread(self._widths),
        "height": _spread(self._heights),
        "bytes": _spread(self._bytes),
      },
      "box_area": _spread(self._areas),
      "samples": self._good,
    }

  def _answers_read(self) -> dict[str, dict[str, int]]:
    """Returns how read -> number of answers -> questions."""
    found: dict[str, dict[str, int]] = {}
    for (how, number), count in sorted(self._read.items()):
      found.setdefault(how, {})[str(number)] = count
    return found

  def _repeated_ids(self, source: Sequence[Record]) -> dict[str, Any]:
    hashes = np.frombuffer(self._hashes, np.uint64)
    values, counts = np.unique(hashes, return_counts=True)
    repeated = values[counts > 1]
    reader = RecordReader(source, "repeated ids")
    examples = []
    for value in repeated[:_MAX_REPEATED]:
      rows = np.flatnonzero(hashes == value)[:_MAX_REPEATED]
      indices = [self._hashed[row] for row in rows]
      examples.append(
        {
          "id": _id_of(reader.read(indices[0], lambda record: record.id)),
          "places": [sources.locate(source, index) for index in indices],
        }
      )
    return {
      "ids": len(repeated),
      "records": int(counts[counts > 1].sum()),
      "examples": examples,
    }


def _spread(values: "array[Any]") -> dict[str, float] | None:
  """Returns minimum, median and maximum; None without values."""
  if not len(values):
    return None
  found = np.asarray(values)
  middle = float(np.median(found))
  return {
    "min": found.min().item(),
    "median": middle,
    "max": found.max().item(),
  }
