"""A user's own data: one JSON object a line, pictures in files beside it.

    {"image": "photos/1.jpg", "prompt": "how many dogs?", "target": "two"}

| key     | value                                                            |
| ------- | ---------------------------------------------------------------- |
| image   | a JPEG, PNG, WebP, GIF, BMP, TIFF or MPO file; relative names    |
|         | start at the folder of the .jsonl file, those with ~/ at the     |
|         | home folder                                                      |
| task    | caption, vqa, grounding or entailment; may be left out. A source |
|         | has the rows of its own task, and those that name none           |
| prompt  | question, expression or hypothesis; none for captions            |
| target  | caption: a text, or a list of references                         |
|         | vqa: an answer, a list of right ones, a list with repeats (one   |
|         | answer of each annotator), or {answer: score}                    |
|         | grounding: [x0, y0, x1, y1] in pixels                            |
|         | entailment: yes, no, maybe, or entailment, contradiction,        |
|         | neutral. May be left out for prediction                          |
| id      | a name or a number; by default, or if null, "FILE:ROW"           |
| premise | entailment only: a caption of the picture                        |
| objects | vqa only: a list of names                                        |
| kind    | a sub-category for reports                                       |
"""

import json
import pathlib
from typing import Any

import numpy as np

from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.sources import fields, files
from narvl_jax.data.sources.rows.files import RowFile, text
from narvl_jax.data.sources.rows.source import RowSource
from narvl_jax.errors import UserError, did_you_mean

KEYS = (
  "image",
  "task",
  "prompt",
  "target",
  "id",
  "premise",
  "objects",
  "kind",
)
# The task of a row that names none, and of one that cannot be read: every
# source of the file has it, to say what is wrong with it.
_ANY = ""
# JSON takes up to thirty times as much memory as its text.
_MAX_BYTES = 1 << 24


class JsonlSource(RowSource):
  """Records of JSON-lines files."""

  name = "jsonl"

  def __init__(
    self,
    *,
    task: str,
    split: str,
    seed: int = 0,
    path: files.PathOption = None,
    index_dir: str = "",
  ) -> None:
    """Opens the files and finds the rows of the task; the seed has no effect.

    Args:
      task: one of `TASKS`; rows of another task are left out.
      split: any; replaces `{split}` in `path`.
      path: files; see `files.resolve`.
      index_dir: folder for the index of rows; see `row_index.open_index`.

    Raises:
      UserError: an option is wrong, a file cannot be read, or no row has the
        task.
    """
    del seed
    super().__init__(task=task, split=split, path=path, index_dir=index_dir)
    # Most files name no task, and reading every row would take seconds.
    if any(file.contains(b'"task"') for file in self.rows.files):
      self._numbers = self._of_task()

  def _of_task(self) -> np.ndarray:
    others: set[str] = set()
    kept = []
    for number in range(len(self.rows)):
      found = self._task_of(number)
      if found in (_ANY, self.task):
        kept.append(number)
      else:
        others.add(found)
    if not kept:
      raise UserError(
        f'jsonl: no row of "{self.rows.files[0].path}" has the task'
        f' "{self.task}", the rows have {", ".join(sorted(others))}; change the'
        " task"
      )
    return np.asarray(kept, np.int64)

  def _task_of(self, number: int) -> str:
    try:
      row = self.rows[number]
      found = _parse(row).get("task") if b'"task"' in row else _ANY
    except UserError:
      return _ANY
    return found if found in TASKS else _ANY

  def _record(self, row: bytes, file: RowFile, index: int) -> Record:
    values = _parse(row)
    for key in values:
      if key not in KEYS:
        raise UserError(f'the key "{key}" is unknown.{did_you_mean(key, KEYS)}')
    task = values.get("task")
    if task is not None and task != _ANY and task not in TASKS:
      near = did_you_mean(task if isinstance(task, str) else "", TASKS)
      raise UserError(f"the task is {fields.quoted(task)}.{near}")
    objects = values.get("objects")
    if objects is not None and (
      not isinstance(objects, list)
      or not all(isinstance(name, str) for name in objects)
    ):
      raise UserError(
        f'"objects" is {fields.quoted(objects)}; it must be a list of names,'
        " such as"
        ' ["dog", "tree"]'
      )
    truth: dict[str, Any] = {}
    target = values.get("target")
    if target is not None:
      truth = _TARGETS[self.task](target)
    given = values.get("id")
    name = f"{file.path.name}:{index + 1}" if given is None else str(given)
    return Record(
      id=name,
      task=self.task,
      image=_read_image(file.path.parent, _word(values, "image")),
      prompt=_word(values, "prompt"),
      premise=_word(values, "premise"),
      objects=None if objects is None else tuple(objects),
      kind=_word(values, "kind"),
      **truth,
    )


def _parse(row: bytes) -> dict[str, Any]:
  if len(row) > _MAX_BYTES:
    raise UserError(
      f"the row has {len(row):,} bytes, the limit is {_MAX_BYTES:,}; pictures"
      " are files beside it"
    )
  try:
    values = json.loads(text(row, "row"))
  except json.JSONDecodeError as e:
    raise UserError(
      f"the row is no JSON ({e.msg} at character {e.pos + 1}); it must be one"
      ' object, such as {"image": "photo.jpg", "target": "two"}'
    ) from e
  except RecursionError as e:
    raise UserError(
      "the row is JSON of lists or objects that are nested too deep; it must"
      ' be one object, such as {"image": "photo.jpg", "target": "two"}'
    ) from e
  except ValueError as e:  # An integer of thousands of digits.
    raise UserError(f"the row holds a number that cannot be read: {e}") from e
  if not isinstance(values, dict):
    raise UserError(
      f"the row is a JSON {type(values).__name__}; it must be an object in"
      " braces"
    )
  return values


def _word(values: dict[str, Any], key: str) -> str:
  value = values.get(key)
  if value is None:
    value = ""
  if not isinstance(value, str):
    raise UserError(
      f'"{key}" is {fields.quoted(value)}; it must be a text in quotes'
    )
  return value


def _read_image(folder: pathlib.Path, name: str) -> bytes:
  if not name:
    raise UserError('the row has no "image"; name a picture file')
  path = folder / files.with_home(name)
  return images.read_image_file(
    path, "names are relative to the folder of the .jsonl file"
  )


def _caption(target: Any) -> dict[str, Any]:
  references = target if isinstance(target, list) else [target]
  return {"answers": fields.captions(references)}


def _vqa(target: Any) -> dict[str, Any]:
  if isinstance(target, dict):
    return {"answers": fields.scored_answers(target.items())}
  return fields.listed_answers(target if isinstance(target, list) else [target])


def _grounding(target: Any) -> dict[str, Any]:
  return {"box": fields.pixel_box(target)}


def _entailment(target: Any) -> dict[str, Any]:
  label = target if isinstance(target, str) else fields.quoted(target)
  return {"answers": fields.entailment_answer(label.strip())}


_TARGETS: dict[str, Any] = {
  "caption": _caption,
  "vqa": _vqa,
  "grounding": _grounding,
  "entailment": _entailment,
}
