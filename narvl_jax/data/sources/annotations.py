"""Official annotations, joined to the records of a data set by their ids.

A file is the JSON of one of

- VQA v2 and OK-VQA: {"annotations": [{question_id, answers: [{answer}],
  answer_type, question_type}]},
- COCO captions: {"annotations": [{image_id, caption}]},
- A-OKVQA: [{question_id, direct_answers, difficult_direct_answer}].
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from narvl_jax.data import sources
from narvl_jax.data.answer_text import annotator_scores
from narvl_jax.data.captions import coco_captions, json_file
from narvl_jax.data.example import Record
from narvl_jax.data.sources import fields
from narvl_jax.data.sources.base import RecordSource
from narvl_jax.errors import UserError
from narvl_jax.terminal import progress

# Id of a record -> fields of `Record` that the annotations replace.
Annotations = Mapping[str, Mapping[str, Any]]


def load_annotations(path: str | os.PathLike[str], task: str) -> Annotations:
  """Reads a file of annotations.

  Args:
    task: "vqa" or "caption".

  Raises:
    UserError: the file cannot be read or has another form, or the task has no
      annotations.
  """
  if task == "caption":
    return {
      str(picture): {
        "answers": fields.captions(captions),
        # Equal captions of one picture count as often as they were written.
        "people": tuple(captions),
      }
      for picture, captions in coco_captions(path).items()
    }
  if task != "vqa":
    raise UserError(
      f'"{path}" annotates a data set of {task}; only vqa and caption have'
      ' annotations: leave them out (annotations="")'
    )
  form = (
    "annotations of VQA v2"
    ' {"annotations": [{"question_id": 1, "answers": [{"answer": "yes"}]}]}'
    ' nor of A-OKVQA [{"question_id": "a", "direct_answers": ["yes"]}]'
  )
  with json_file(path, form) as content:
    if isinstance(content, list):
      return {str(x["question_id"]): _a_okvqa(x) for x in content}
    return {str(x["question_id"]): _vqa(x) for x in content["annotations"]}


def _vqa(entry: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "people": _texts(answer["answer"] for answer in entry["answers"]),
    "kind": str(entry.get("answer_type", "")),
    "question_type": str(entry.get("question_type", "")),
  }


def _a_okvqa(entry: Mapping[str, Any]) -> dict[str, Any]:
  # The official figure leaves difficult questions out.
  difficult = entry.get("difficult_direct_answer", False)
  return {"people": () if difficult else _texts(entry["direct_answers"])}


def _texts(values: Any) -> tuple[str, ...]:
  found = tuple(values)
  if not all(isinstance(text, str) for text in found):
    raise TypeError("an answer is not a text")
  return found


class AnnotatedSource(RecordSource):
  """Records with the fields of their annotations.

  A record without annotation stays as it is: see `check`. One without answers
  gets those of the people, with their scores by VQA v2.
  """

  def __init__(
    self,
    source: Sequence[Record],
    path: str | os.PathLike[str],
    *,
    task: str,
    split: str,
    name: str,
  ) -> None:
    """Reads the annotations.

    Args:
      name: entry of `data.evaluation`, for messages.

    Raises:
      UserError: see `load_annotations`.
    """
    self.task, self.split = task, split
    self._source, self._path, self._name = source, path, name
    self._annotations = load_annotations(path, task)
    self._checked: set[int] = set()

  def __len__(self) -> int:
    return len(self._source)

  def _read(self, number: int) -> Record:
    record = self._source[number]
    changes = dict(self._annotations.get(record.id, {}))
    if changes.get("people") and not record.answers:
      changes["answers"] = annotator_scores(changes["people"])
    if not changes.get("kind", "-"):
      del changes["kind"]
    return dataclasses.replace(record, **changes)

  def _place(self, number: int) -> str:
    return sources.locate(self._source, number)

  def check(self, indices: Sequence[int]) -> None:
    """Checks that records have annotations; reads each of them once.

    Raises:
      UserError: some have none.
    """
    new = [i for i in indices if i not in self._checked]
    missing = []
    with progress.doing("finding annotations", len(new), "records") as activity:
      for done, index in enumerate(new):
        activity.done = done
        try:
          found = self._source[index].id
        except Exception:  # A bad record, which the evaluation reports.
          continue
        if found not in self._annotations:
          missing.append(found)
    if missing:
      known = next(iter(self._annotations), "")
      raise UserError(
        f"data.evaluation.{self._name}: {len(missing)} of {len(new)} records"
        f' have no annotation in "{self._path}", the first has the id'
        f' "{missing[0]}"; the file has {len(self._annotations)}, such as'
        f' "{known}". Name the file of the split "{self.split}" by'
        f" --config.data.evaluation.{self._name}.annotations= (evaluate:"
        " --annotations=); {split} in its name is replaced by the split"
      )
    self._checked |= set(new)
