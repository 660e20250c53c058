"""Inspects a data set as a run with given limits would read it."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from narvl_jax.data.answer_text import normalized_answers
from narvl_jax.data.batches.bad_records import (
  BadRecord,
  RecordReader,
  short_reason,
)
from narvl_jax.data.checking.findings import Collector, Finding
from narvl_jax.data.checking.findings import Limits as Limits
from narvl_jax.data.checking.picture_facts import examine
from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images
from narvl_jax.data.sources.subset import spread
from narvl_jax.data.tasks import Task, make_task
from narvl_jax.data.tasks.base import required_queries
from narvl_jax.errors import UserError
from narvl_jax.terminal import progress

_CHUNK = 64
# Most records that are read; each takes 16 bytes of memory.
_MAX_READ = 50_000_000
# EXIF tags of at least this swap width and height.
_SIDEWAYS = 5
_WORD_LIMITS = ("max_source_words", "max_target_words")


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
    task: task with a vocabulary.
    max_examples: records to read, evenly spread; 0: all.
    all_texts: read the texts of all records, and `max_examples` pictures.

  Returns:
    Figures for JSON; `samples` are indices of good records with a picture.

  Raises:
    UserError: there are too many records.
  """
  total = len(source)
  count = min(total, max_examples) if max_examples else total
  whole = spread(total, count)
  indices = range(total) if all_texts else whole
  if len(indices) > _MAX_READ:
    raise UserError(
      f"{len(indices):,} records are too many to read all of them; the limit is"
      f" {_MAX_READ:,}: set --max_examples to a few thousand, without --all"
    )
  reader = _Reader(source, task, frozenset(whole) if all_texts else None)
  collector = Collector(task, limits)
  chunks = (indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK))
  with progress.doing("checking", len(indices), "records") as checking:
    for findings in _in_threads(reader, chunks, num_threads):
      for finding in findings:
        collector.add(finding)
      checking.advance(len(findings))
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


def _in_threads(
  function: Any, items: Iterator[Any], num_threads: int
) -> Iterator[Any]:
  """Maps in order with few items in memory."""
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    waiting: collections.deque[Any] = collections.deque()
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) >= 4 * num_threads:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


class _Reader:
  """Maps indices to findings."""

  def __init__(
    self,
    source: Sequence[Record],
    task: Task[Any],
    whole: frozenset[int] | None,
  ) -> None:
    """Reads the pictures of `whole` only; None: of all records."""
    self._records = RecordReader(source, task.name)
    self._task, self._whole = task, whole
    settings = dataclasses.asdict(task.settings)
    unlimited = {key: 0 for key in _WORD_LIMITS if settings.get(key)}
    self._uncut = None
    if unlimited:
      settings.update(unlimited)
      self._uncut = make_task(task.name, task.vocabulary, settings)

  def __call__(self, indices: Sequence[int]) -> list[Finding]:
    return [self._read(index) for index in indices]

  def _read(self, index: int) -> Finding:
    found = self._records.read(index, functools.partial(self._finding, index))
    if not isinstance(found, BadRecord):
      return found
    if found.record_id is None:
      return Finding(index, error=found.reason)
    return Finding(
      index,
      _hash(found.record_id),
      found.reason,
      found.record_id,
      kind=found.kind,
    )

  def _finding(self, index: int, record: Record) -> Finding:
    has_target = bool(record.answers) or record.box is not None
    seen = self._seen(index, record)
    try:
      encoded = self._task.encode(record, with_target=has_target)
    except UserError as error:
      if seen.get("box_fits") != "other":
        raise
      # The box is evidence for another orientation.
      return Finding(
        index,
        _hash(record.id),
        short_reason(error),
        record.id,
        kind=record.kind,
        **seen,
      )
    uncut = encoded
    if self._uncut is not None:
      uncut = self._uncut.encode(record, with_target=has_target)
    encoded_bytes = isinstance(record.image, bytes)
    size = facts = None
    if self._is_whole(index):
      size = images.original_size(record.image)
      if isinstance(record.image, bytes):
        facts = examine(record.image)
      else:
        # As small as possible, because only decoding may fail.
        images.prepare_image(record.image, (1, 1))
    return Finding(
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
      facts=facts,
      **seen,
    )

  def _is_whole(self, index: int) -> bool:
    return self._whole is None or index in self._whole

  def _seen(self, index: int, record: Record) -> dict[str, Any]:
    """Returns the orientation of a picture file, and which one fits the box."""
    image, box = record.image, record.box
    if not isinstance(image, bytes) or not (box or self._is_whole(index)):
      return {}
    orientation = images.orientation(image)
    fits = ""
    if box is not None and len(box) == 4 and orientation >= _SIDEWAYS:
      width, height = images.original_size(image)
      margin = getattr(self._task.settings, "max_outside", 0.0)
      this, other = (
        _fits(box, size, margin) for size in ((width, height), (height, width))
      )
      fits = {(True, False): "this", (False, True): "other"}.get(
        (this, other), ""
      )
    return {"orientation": orientation, "box_fits": fits}


def _fits(box: Sequence[float], size: tuple[int, int], margin: float) -> bool:
  """Returns whether a box lies in a picture of (width, height)."""
  width, height = size
  x0, y0, x1, y1 = box
  inside = min(x0, y0, width - x1, height - y1) >= -margin
  return inside and x0 < width and y0 < height


def _hash(text: str) -> int:
  digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8)
  return int.from_bytes(digest.digest(), "little")


def _best(record: Record) -> str | None:
  answers = normalized_answers(record.answers)
  return max(answers, key=answers.__getitem__) if answers else None


def _how_read(record: Record) -> str:
  """Returns the key of `answers_read` for a question."""
  if record.task != "vqa" or not record.answers:
    return ""
  if record.annotators:
    return "annotators"
  if any(score < 1 for score in record.answers.values()):
    return "scored"
  return "several" if len(record.answers) > 1 else "one"
