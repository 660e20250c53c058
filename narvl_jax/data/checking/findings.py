"""Figures of a data set, accumulated over its records."""

import collections
import dataclasses
import re
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from narvl_jax.data import sources
from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.checking.picture_facts import PictureFacts
from narvl_jax.data.example import Record
from narvl_jax.data.tasks import Task

# Most bad rows, different answers and repeated ids that are kept.
_MAX_BAD_ROWS = 10
_MAX_ANSWERS = 200_000
_MAX_REPEATED = 3
# Parts of a message that differ between records: these are cut for counting.
_VARIABLE = re.compile(
  r"""\([^()]*\)|"[^"]*"|(?<!\w)b?'[^']*'|(?<!\w)\d[\d.,]*"""
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a run.

  Attributes:
    image_size: (height, width) in pixels of the model's input.
    max_text_length: tokens of the prompt with bos and eos.
    max_label_length: labels of the target.
    max_text_positions: tokens for which the model has positions.
    max_bad_fraction: fraction of bad records that stops a run.
  """

  image_size: tuple[int, int] = (480, 480)
  max_text_length: int = 80
  max_label_length: int = 20
  num_queries: int = 20
  max_text_positions: int = 1026
  max_bad_fraction: float = 0.01
  exif_orientation: str = "ignore"


class Finding(NamedTuple):
  """Facts about one record."""

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
  # How the answers of a question were read, and their number.
  answers_read: str = ""
  answers: int = 0
  kind: str = ""
  image_size: tuple[int, int] | None = None
  image_bytes: int = 0
  box: tuple[float, ...] | None = None
  # EXIF tag of an encoded picture; 0 if it was not read.
  orientation: int = 0
  # "this" or "other" if the box fits the picture in one orientation only.
  box_fits: str = ""
  facts: PictureFacts | None = None


class Collector:
  """Accumulates findings."""

  def __init__(self, task: Task[Any], limits: Limits) -> None:
    self._limits = limits
    self._has_boxes = task.name == "grounding"
    # Hash of the id and index of every record, to find repeated ids.
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
    # Indices of pictures without visible content.
    self._unseen: dict[str, list[int]] = {"one_color": [], "hidden": []}

  def add(self, finding: Finding) -> None:
    """Adds the finding of one record."""
    if finding.id_hash:
      self._hashes.append(finding.id_hash)
      self._hashed.append(finding.index)
    if finding.kind:
      self._kinds[finding.kind] += 1
    self._add_orientation(finding)
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

  def _add_orientation(self, finding: Finding) -> None:
    counts = self._counts
    counts["orientations"] += finding.orientation > 0
    counts["tagged"] += finding.orientation > 1
    if finding.box_fits:
      counts[f"fit_only_{finding.box_fits}"] += 1
      counts["bad_other"] += bool(finding.error)
    if finding.facts is not None:
      counts["examined"] += 1
      for name, indices in self._unseen.items():
        if getattr(finding.facts, name):
          indices.append(finding.index)

  def _add_bad(self, finding: Finding) -> None:
    self._counts["bad"] += 1
    self._reasons[_VARIABLE.sub("...", finding.error)[:120]] += 1
    if len(self._bad_rows) < _MAX_BAD_ROWS:
      self._bad_rows.append((finding.index, finding.record_id, finding.error))

  def _add_box(self, box: Sequence[float], size: tuple[int, int]) -> None:
    x0, y0, x1, y1 = box
    self._areas.append((x1 - x0) * (y1 - y0) / (size[0] * size[1]))
    # Boxes in pixels exceed 1, except in a picture of one pixel.
    self._counts["boxes_of_fractions"] += max(box) <= 1 < min(size)

  def figures(self, source: Sequence[Record]) -> dict[str, Any]:
    """Returns the part of `inspect`'s figures that depends on the records."""
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
        **self._picture_figures(source),
      },
      "box_area": _spread(self._areas),
      "samples": self._good,
    }

  def _picture_figures(self, source: Sequence[Record]) -> dict[str, Any]:
    """Returns figures of orientation tags and invisible content."""
    counts = self._counts
    names = ("tagged", "fit_only_this", "fit_only_other", "bad_other")
    unseen = {
      name: {
        "count": len(indices),
        "example": sources.locate(source, indices[0]) if indices else "",
      }
      for name, indices in self._unseen.items()
    }
    orientation = {name: counts[name] for name in names}
    return {
      "orientation": {"of": counts["orientations"], **orientation},
      "examined": counts["examined"],
      **unseen,
    }

  def _answers_read(self) -> dict[str, dict[str, int]]:
    """Returns {how read: {number of answers: questions}}."""
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
      found = reader.read(indices[0], lambda record: record.id)
      examples.append(
        {
          "id": "?" if isinstance(found, BadRecord) else found,
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
  low, high = found.min().item(), found.max().item()
  return {"min": low, "median": float(np.median(found)), "max": high}
