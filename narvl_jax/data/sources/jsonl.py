"""A user's own data: one JSON object a line, pictures in files beside it.

    {"image": "photos/1.jpg", "prompt": "how many dogs?", "target": "two"}

docs/data.md lists the keys (`KEYS`) and the targets of each task.
"""

import json
import pathlib
from typing import Any

import numpy as np

from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.sources import fields
from narvl_jax.data.sources.rows.files import RowFile, text
from narvl_jax.data.sources.rows.source import RowSource
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.files.stores import beside

KEYS = ("image", "task", "prompt", "target", "id", "premise", "objects", "kind")
# The task of a row that names none or cannot be read. Every source of the file
# has such rows, so that a bad one is reported.
_ANY = ""
# JSON takes up to thirty times as much memory as its text.
_MAX_BYTES = 1 << 24


class JsonlSource(RowSource):
  """Records of JSON-lines files; rows of another task are skipped."""

  name = "jsonl"

  def _select_rows(self) -> np.ndarray | None:
    # Most files name no task, and reading every row would take seconds.
    if not any(file.contains(b'"task"') for file in self.rows.files):
      return None
    found = [self._task_of(number) for number in range(len(self.rows))]
    kept = [i for i, task in enumerate(found) if task in (_ANY, self.task)]
    if not kept:
      raise UserError(
        f'jsonl: no row of "{self.rows.files[0].path}" has the task'
        f' "{self.task}", the rows have {", ".join(sorted(set(found)))}; change'
        " the task"
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
    target = values.get("target")
    given = values.get("id")
    name = f"{file.path.name}:{index + 1}" if given is None else str(given)
    return Record(
      id=name,
      task=self.task,
      image=_read_image(file.path.parent, _word(values, "image")),
      prompt=_word(values, "prompt"),
      premise=_word(values, "premise"),
      objects=_objects(values.get("objects")),
      kind=_word(values, "kind"),
      **({} if target is None else _TARGETS[self.task](target)),
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
      f"the row is not JSON ({e.msg} at character {e.pos + 1}); it must be one"
      ' object, such as {"image": "photo.jpg", "target": "two"}'
    ) from e
  except RecursionError as e:
    raise UserError(
      "the row is JSON of lists or objects that are nested too deep; it must"
      ' be one object, such as {"image": "photo.jpg", "target": "two"}'
    ) from e
  except ValueError as e:  # An integer of thousands of digits.
    raise UserError(
      f"the row contains a number that cannot be read: {e}"
    ) from e
  if not isinstance(values, dict):
    raise UserError(
      f"the row is a JSON {type(values).__name__}; it must be an object in"
      " braces"
    )
  return values


def _word(values: dict[str, Any], key: str) -> str:
  value = values.get(key)
  if value is None:
    return ""
  if not isinstance(value, str):
    raise UserError(
      f'"{key}" is {fields.quoted(value)}; it must be a text in quotes'
    )
  return value


def _objects(names: Any) -> tuple[str, ...] | None:
  if names is None:
    return None
  if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
    raise UserError(
      f'"objects" is {fields.quoted(names)}; it must be a list of names, such'
      ' as ["dog", "tree"]'
    )
  return tuple(names)


def _read_image(folder: pathlib.Path, name: str) -> bytes:
  if not name:
    raise UserError('the row has no "image"; name a picture file')
  return images.read_image_file(
    beside(folder, name),
    "names are relative to the folder of the .jsonl file",
  )


def _listed(target: Any) -> list[Any]:
  return target if isinstance(target, list) else [target]


def _vqa(target: Any) -> dict[str, Any]:
  if isinstance(target, dict):
    return {"answers": fields.scored_answers(target.items())}
  return fields.listed_answers(_listed(target))


def _entailment(target: Any) -> dict[str, Any]:
  label = target if isinstance(target, str) else fields.quoted(target)
  return {"answers": fields.entailment_answer(label.strip())}


_TARGETS: dict[str, Any] = {
  "caption": lambda target: {"answers": fields.captions(_listed(target))},
  "vqa": _vqa,
  "grounding": lambda target: {"box": fields.pixel_box(target)},
  "entailment": _entailment,
}
