"""The TSV files that OFA distributes and the reference trains on.

No header; fields are separated by tabs; the picture is base64. Lists of
captions, answers ("score|!+answer") and object names are joined by "&&".
"""

import binascii
import collections
from collections.abc import Sequence
from typing import Any

import pybase64

from narvl_jax.data.example import Record
from narvl_jax.data.sources import fields, files
from narvl_jax.data.sources.rows.files import RowFile, text
from narvl_jax.data.sources.rows.source import RowSource
from narvl_jax.errors import UserError

# Columns that each task reads by default: id, picture, and
COLUMNS = {
  "caption": (0, 4, 2),  # captions
  "vqa": (0, 5, 2, 3, 4),  # question, answers, object names
  "grounding": (0, 4, 2, 3),  # expression, "x0,y0,x1,y1" in pixels
  "entailment": (0, 2, 3, 4, 5),  # hypothesis, caption, label
}
# Columns at the end that may be left out.
_OPTIONAL = {"vqa": 1}
SEPARATOR = "&&"
_STANDARD = bytes.maketrans(b"-_", b"+/")
# Rows at the start of a file from which its number of columns is inferred.
_FIRST_ROWS = 5


class OfaTsvSource(RowSource):
  """Records of OFA TSV files.

  Attributes:
    columns: columns to read, in the order of `COLUMNS`.
    num_columns: number of columns of every row.
  """

  name = "ofa_tsv"

  def __init__(
    self,
    *,
    task: str,
    split: str,
    path: files.PathOption = None,
    columns: str | Sequence[int] = "",
    index_dir: str = "",
  ) -> None:
    """Opens the files; see `RowSource` for the other options.

    `columns` is `selected_cols` of the reference, such as "0,4,2" or
    (0, 4, 2); by default `COLUMNS`.

    Raises:
      UserError: an option is wrong, or a file cannot be read.
    """
    super().__init__(task=task, split=split, path=path, index_dir=index_dir)
    self.columns = _parse_columns(columns, task)
    self.num_columns = self._count_columns()

  def _count_columns(self) -> int:
    """Returns the most frequent number of columns of the first rows."""
    counts: collections.Counter[int] = collections.Counter()
    for index in range(min(_FIRST_ROWS, len(self.rows))):
      try:
        counts[self.rows[index].count(b"\t") + 1] += 1
      except ValueError:
        continue
    needed = max(self.columns) + 1
    found = counts.most_common(1)[0][0] if counts else needed
    if found < needed:
      raise UserError(
        f'"{self.rows.files[0].path}" has {found} columns; {self.task} reads'
        f" columns {','.join(map(str, self.columns))} (from 0), so at least"
        f" {needed}: check the task, or set options.columns"
      )
    return found

  def _record(self, row: bytes, file: RowFile, index: int) -> Record:
    del file, index
    found = row.split(b"\t")
    if len(found) != self.num_columns:
      raise UserError(
        f"the row has {len(found)} columns, not {self.num_columns}"
      )
    first, picture, *rest = (found[column] for column in self.columns)
    names = (f"column {column}" for column in self.columns[2:])
    texts = [text(field, name) for field, name in zip(rest, names, strict=True)]
    return Record(
      id=text(first, f"column {self.columns[0]}"),
      task=self.task,
      **_READERS[self.task](*texts),
      image=decode_base64(picture),
    )


def decode_base64(field: bytes) -> bytes:
  """Decodes base64 of the standard or the URL-safe alphabet.

  No character is skipped.

  Raises:
    UserError: the field is empty or damaged.
  """
  if not field:
    raise UserError("the picture's column is empty")
  try:
    return pybase64.b64decode(field, validate=True)
  except binascii.Error:
    # A field may mix both alphabets.
    standard = field.translate(_STANDARD)
  try:
    return pybase64.b64decode(standard, validate=True)
  except binascii.Error as e:
    raise UserError(
      f"the picture's column is broken base64 ({len(field)} characters): {e}"
    ) from e


def _parse_columns(columns: Any, task: str) -> tuple[int, ...]:
  default = COLUMNS[task]
  if isinstance(columns, str) and not columns.strip():
    return default
  values = columns.split(",") if isinstance(columns, str) else columns
  try:
    parsed = tuple(int(value) for value in values)
  except (TypeError, ValueError):
    parsed = ()
  fewest = len(default) - _OPTIONAL.get(task, 0)
  if not fewest <= len(parsed) <= len(default) or min(parsed) < 0:
    usual = ",".join(map(str, default))
    number = " or ".join(map(str, range(fewest, len(default) + 1)))
    raise UserError(
      f"ofa_tsv: options.columns is {columns!r}; {task} needs {number} column"
      f' numbers from 0 on, such as options.columns="{usual}"'
    )
  return parsed


def _caption(captions: str) -> dict[str, Any]:
  return {"answers": fields.captions(captions.split(SEPARATOR))}


def _vqa(
  question: str, answers: str, objects: str | None = None
) -> dict[str, Any]:
  pairs = []
  # A test set has no answers.
  for item in answers.split(SEPARATOR) if answers.strip() else ():
    score, mark, answer = item.partition("|!+")
    if not mark:
      raise UserError(
        f"the answer {item!r} has no confidence; answers look like"
        " 0.6|!+yes&&0.3|!+no"
      )
    pairs.append((answer, score))
  names = None
  if objects is not None:
    names = tuple(objects.split(SEPARATOR)) if objects else ()
  return {
    "prompt": question,
    "answers": fields.scored_answers(pairs),
    "objects": names,
  }


def _grounding(expression: str, box: str) -> dict[str, Any]:
  return {"prompt": expression, "box": fields.pixel_box(box.split(","))}


def _entailment(hypothesis: str, premise: str, label: str) -> dict[str, Any]:
  return {
    "prompt": hypothesis,
    "premise": premise,
    "answers": fields.entailment_answer(label.strip()),
  }


_READERS: dict[str, Any] = {
  "caption": _caption,
  "vqa": _vqa,
  "grounding": _grounding,
  "entailment": _entailment,
}
