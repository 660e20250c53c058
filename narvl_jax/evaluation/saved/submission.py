"""Predictions in the submission formats of the data sets."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from narvl_jax.errors import UserError, did_you_mean, list_few
from narvl_jax.evaluation.reporting import Prediction
from narvl_jax.evaluation.saved.files import Saved

# Format -> task of its predictions.
FORMATS = {
  "coco": "caption",
  "vqa": "vqa",
  "refcoco": "grounding",
  "aokvqa": "vqa",
}
# Such as "COCO_val2014_000000391895.jpg".
_COCO_NAME = re.compile(r"(?:COCO_\w+_)?(\d+)(?:\.jpg)?", re.ASCII)
_INTEGER = re.compile(r"\d+", re.ASCII)
_SHOWN = 3


def submission(predictions: Sequence[Prediction], form: str) -> Any:
  """Returns the content of a submission file.

  | format    | content                                                       |
  | --------- | ------------------------------------------------------------- |
  | `coco`    | [{"image_id": int, "caption": str}]                           |
  | `vqa`     | [{"question_id": int, "answer": str}]                         |
  | `refcoco` | [{"sent_id": int, "box": [x, y, width, height]}] in pixels    |
  | `aokvqa`  | {question id: {"multiple_choice": "", "direct_answer": str}}  |

  An id of RefCOCO that is not an integer, such as "79_1" of OFA's files, stays
  a text.

  Args:
    predictions: predictions of the format's task, one for each id.
    form: one of `FORMATS`.

  Raises:
    UserError: an id occurs twice, or is not an integer in such a format.
  """
  ids = [_id(x["id"], form) for x in predictions]
  _check_unique(ids, form)
  values = [x["prediction"] for x in predictions]
  pairs = zip(ids, values, strict=True)
  if form == "coco":
    return [{"image_id": i, "caption": x} for i, x in pairs]
  if form == "vqa":
    return [{"question_id": i, "answer": x} for i, x in pairs]
  if form == "refcoco":
    return [
      {"sent_id": i, "box": [x0, y0, x1 - x0, y1 - y0]}
      for i, (x0, y0, x1, y1) in pairs
    ]
  return {i: {"multiple_choice": "", "direct_answer": x} for i, x in pairs}


def _id(text: str, form: str) -> int | str:
  pattern = _COCO_NAME if form == "coco" else _INTEGER
  found = pattern.fullmatch(text)
  if form == "aokvqa" or (form == "refcoco" and not found):
    return text
  if not found:
    what = "a picture" if form == "coco" else "a question"
    raise UserError(
      f"--format={form} needs the number of {what} as the id of each record,"
      f' such as "391895"; an id is "{text}". Evaluate on data with these ids:'
      ' the first of options.columns of a *.tsv, the key "id" of a *.jsonl'
    )
  return int(found.groups()[0] if found.groups() else text)


def _check_unique(ids: Sequence[int | str], form: str) -> None:
  seen: set[int | str] = set()
  twice = [i for i in ids if i in seen or seen.add(i)]
  if twice:
    more = ""
    if form == "coco":
      more = (
        "; a picture needs one caption: evaluate on a file with a row per"
        " picture"
      )
    raise UserError(
      f"{len(twice):,} ids are there more than once:"
      f" {list_few([str(x) for x in twice], _SHOWN)}{more}"
    )


def choose(
  predictions: Sequence[Prediction], form: str, dataset: str = ""
) -> list[Prediction]:
  """Returns the predictions of one data set, in the order of its records.

  Args:
    predictions: predictions of an evaluation.
    form: one of `FORMATS`.
    dataset: entry of `data.evaluation`; the only one of the task by default.

  Raises:
    UserError: there is none, or there are several and none is chosen.
  """
  task = FORMATS[form]
  own = [x for x in predictions if x["task"] == task]
  names = list(dict.fromkeys(x["dataset"] for x in own))
  if not names:
    tasks = ", ".join(sorted({x["task"] for x in predictions}))
    raise UserError(
      f"--format={form} needs predictions of {task}; the file has {tasks}"
    )
  if dataset and dataset not in names:
    raise UserError(
      f"--dataset={dataset} is not in the file.{did_you_mean(dataset, names)}"
    )
  if len(names) > 1 and not dataset:
    raise UserError(
      f"the file has {task} of several data sets: {', '.join(names)}; choose"
      f" one by --dataset={names[0]}"
    )
  kept = [x for x in own if x["dataset"] == (dataset or names[0])]
  return sorted(kept, key=lambda x: x["index"])


def check_complete(saved: Saved, predictions: Sequence[Prediction]) -> None:
  """Checks that each example of a data set is there exactly once.

  The report has the number of records; a bad one has no prediction.

  Args:
    saved: the evaluation, with its report.
    predictions: predictions of one data set, in the order of its records.

  Raises:
    UserError: an example is missing or occurs twice, or the evaluation had a
      limit.
  """
  assert saved.report is not None
  limit = saved.report.get("max_examples")
  if limit:
    raise UserError(
      f'"{saved.path}" has at most {limit} examples of each data set; evaluate'
      " all with --max_examples=0"
    )
  indices = [x["index"] for x in predictions]
  name = predictions[0]["dataset"]
  twice = [i for i, j in itertools.pairwise(indices) if i == j]
  if twice:
    raise UserError(
      f'example {twice[0]} of "{name}" is there twice; repeat'
      " narvl_jax.evaluate"
    )
  expected = saved.report["datasets"][name]["examples"]
  if len(indices) != expected:
    raise UserError(
      f'"{saved.path}" has {len(indices):,} predictions of "{name}", its report'
      f" has {expected:,} examples; repeat narvl_jax.evaluate"
    )
  # Reports of earlier versions lack the number of records.
  total = saved.report["datasets"][name].get("records", indices[-1] + 1)
  missing = sorted(set(range(total)) - set(indices))
  if missing:
    raise UserError(
      f'{len(missing):,} examples of "{name}" have no prediction, such as'
      f" number {missing[0]}: their records are bad; narvl_jax.check_data"
      " names them"
    )
