"""The TSV files that OFA distributes and the reference trains on.

No header; fields are separated by tabs; the picture is base64. Columns that
are read by default, and what they hold:

| task       | columns   | meaning                                            |
| ---------- | --------- | -------------------------------------------------- |
| caption    | 0,4,2     | id, picture, captions joined by `&&`               |
| vqa        | 0,5,2,3,4 | id, picture, question, `score|!+answer` joined by  |
|            |           | `&&`, names of objects joined by `&&` (may be left |
|            |           | out)                                               |
| grounding  | 0,4,2,3   | id, picture, expression, `x0,y0,x1,y1` in pixels   |
| entailment | 0,2,3,4,5 | id, picture, hypothesis, caption, label            |
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

COLUMNS = {
  "caption": (0, 4, 2),
  "vqa": (0, 5, 2, 3, 4),
  "grounding": (0, 4, 2, 3),
  "entailment": (0, 2, 3, 4, 5),
}
_OPTIONAL = {"vqa": 1}
SEPARATOR = "&&"
_STANDARD = bytes.maketrans(b"-_", b"+/")
# Rows at the start of a file that tell how many columns it has.
_FIRST_ROWS = 5


class OfaTsvSource(RowSource):
  """Records of OFA TSV files.

  Attributes:
    columns: those that are read, in the order of the table above.
    num_columns: that every row must have.
  """

  name = "ofa_tsv"

  def __init__(
    self,
    *,
    task: str,
    split: str,
    seed: int = 0,
    path: files.PathOption = None,
    columns: str | Sequence[int] = "",
    index_dir: str = "",
  ) -> None:
    """Opens the files; the seed has no effect.

    Args:
      task: one of `TASKS`.
      split: any; replaces `{split}` in `path`.
      path: files; see `files.resolve`.
      columns: `selected_cols` of the reference, such as "0,4,2" or (0, 4, 2);
        by default as in the table above.
      index_dir: folder for the index of rows; see `row_index.open_index`.

    Raises:
      UserError: an option is wrong or a file cannot be read.
    """
    del seed
    super().__init__(task=task, split=split, path=path, index_dir=index_dir)
    self.columns = _parse_columns(columns, task)
    self.num_columns = self._count_columns()

  def _count_columns(self) -> int:
    """Returns what most of the first rows have; one may be damaged."""
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
        f"the row has {len(found)} columns, {self.num_columns} are wanted"
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
  """Returns what a base64 field holds, of the standard or URL-safe alphabet.

  Nothing is skipped: a character of neither alphabet is an error.

  Raises:
    UserError: the field is empty or damaged.
  """
  if not field:
    raise UserError("the picture's column is empty")
  try:
    return pybase64.b64decode(field, validate=True)
  except binascii.Error:
    # Both alphabets may even be mixed.
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
