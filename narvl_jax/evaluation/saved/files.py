"""Reads the evaluations stored in a run folder."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from narvl_jax.errors import UserError, list_few
from narvl_jax.evaluation.reporting import Prediction, Report
from narvl_jax.files.regular import open_regular, read_regular
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.text import brief

# Evaluation of the best checkpoint with the settings of the config.
MAIN_FILE = "evaluation.json"
EVALUATIONS_FOLDER = "evaluations"
PREDICTIONS_FOLDER = "predictions"

_KEYS = ("id", "task", "kind", "prediction", "target", "dataset", "index")
_KEYS += ("scores", "answers")


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _are_scores(value: Any) -> bool:
  return value is None or (
    isinstance(value, dict)
    and all(isinstance(x, int | float) for x in value.values())
  )


# Key of a prediction -> check of its value, and what the value should be.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
  **dict.fromkeys(
    ("id", "task", "kind", "dataset", "image", "question_type", "size"),
    (_is_text, "a text"),
  ),
  **dict.fromkeys(
    ("scores", "answers"), (_are_scores, "an object with numbers")
  ),
  "index": (lambda x: isinstance(x, int), "a whole number"),
}
_ADVICE = "give a file predictions/NAME.jsonl of narvl_jax.evaluate"


@dataclasses.dataclass(frozen=True)
class Saved:
  """A stored evaluation.

  Attributes:
    path: file of its predictions.
    report: its report; None for a file outside of a run folder.
    time: time at which the report was written, in seconds.
  """

  path: pathlib.Path
  report: Report | None = None
  time: float = 0.0

  @property
  def examples(self) -> int:
    """Number of predictions; 0 for a file outside of a run folder."""
    return sum(self.report["counts"].values()) if self.report else 0

  def predictions(self) -> list[Prediction]:
    """Reads the predictions.

    Raises:
      UserError: the file cannot be read, or a line is not a prediction.
    """
    found = []
    try:
      with open_regular(self.path) as file:
        for number, line in enumerate(file, 1):
          found.append(_prediction(line, f'"{self.path}" line {number}'))
    except OSError as error:
      reason = error.strerror or error
      raise UserError(f'"{self.path}": {reason}; {_ADVICE}') from error
    if not found:
      raise UserError(f'"{self.path}" has no predictions; {_ADVICE}')
    return found


def _prediction(line: bytes, where: str) -> Prediction:
  try:
    values = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is not JSON ({error}); {_ADVICE}") from error
  found = values if isinstance(values, dict) else {}
  missing = [key for key in _KEYS if key not in found]
  if missing:
    raise UserError(
      f"{where} is not a prediction with its example: it lacks"
      f" {', '.join(missing)}; {_ADVICE}"
    )
  for key, (is_valid, kind) in _VALUES.items():
    if key in values and not is_valid(values[key]):
      raise UserError(
        f'{where}: "{key}" is {brief(repr(values[key]))}, not {kind}; repeat'
        " narvl_jax.evaluate"
      )
  return values


def open_saved(path: str | os.PathLike[str]) -> Saved:
  """Returns the evaluation of a file of predictions.

  Its report is read from `../evaluations`, where `narvl_jax.evaluate` wrote it.

  Raises:
    UserError: the report cannot be read.
  """
  path = as_path(path)
  folder = path.absolute().parent.parent / EVALUATIONS_FOLDER
  report = folder / f"{path.stem}.json"
  if not report.is_file():
    return Saved(path)
  return Saved(path, _read_report(report), report.stat().st_mtime)


def _read_report(path: pathlib.Path) -> Report:
  try:
    report = json.loads(read_regular(path))
    missing = {"split", "decoding_name", "counts"} - report.keys()
    if missing:
      raise ValueError(f"it lacks {', '.join(sorted(missing))}")
  except OSError as error:
    raise UserError(f'"{path}": {error.strerror or error}') from error
  except (ValueError, AttributeError) as error:
    raise UserError(
      f'"{path}" is not a report of an evaluation ({error}); remove it and'
      " repeat"
      " narvl_jax.evaluate"
    ) from error
  return report


def find_pair(
  first: str | os.PathLike[str],
  second: str | os.PathLike[str],
  split: str = "",
) -> tuple[Saved, Saved]:
  """Returns two evaluations that belong together.

  In a run folder this is the one with the most examples that has the split and
  the decoding of the other, and the newest of several. Two files are used as
  given, even with different decodings.

  Args:
    first: a run folder or a file of predictions.
    second: the other one.
    split: split of both; any by default.

  Raises:
    UserError: there is no such pair, or both are the same file.
  """
  one, other = (_candidates(path, split) for path in (first, second))
  free = not any(as_path(path).is_dir() for path in (first, second))
  pairs = [(x, y) for x in one for y in other if free or _fit(x, y)]
  if not pairs:
    raise UserError(
      f'"{first}" and "{second}" share no split and decoding:'
      f" {_list(one)} against {_list(other)}; evaluate one as the other, or"
      " name two files predictions/NAME.jsonl"
    )
  # A run is compared with itself by two of its evaluations.
  pairs = [x for x in pairs if x[0].path != x[1].path] or pairs
  found = max(
    pairs,
    key=lambda pair: (
      min(x.examples for x in pair),
      sorted(x.time for x in pair),
    ),
  )
  if os.path.realpath(found[0].path) == os.path.realpath(found[1].path):
    raise UserError(f'both are the same evaluation, "{found[0].path}"')
  splits = [x.report["split"] for x in found if x.report]
  if len(set(splits)) > 1:
    raise UserError(
      f'"{first}" is of the split "{splits[0]}" and "{second}" of'
      f' "{splits[1]}"; only the same examples can be compared'
    )
  return found


def _candidates(path: str | os.PathLike[str], split: str) -> list[Saved]:
  folder = as_path(path)
  found = [open_saved(folder)]
  if folder.is_dir():
    found = [
      open_saved(file)
      for file in sorted((folder / PREDICTIONS_FOLDER).glob("*.jsonl"))
    ]
    found = [x for x in found if x.report]
  kept = [x for x in found if not split or _split(x) in ("", split)]
  if kept:
    return kept
  if found:
    known = sorted({_split(x) for x in found})
    raise UserError(
      f'"{path}" has no evaluation of --split={split}; it has'
      f" {', '.join(known)}"
    )
  raise UserError(
    f'"{path}" has no evaluation; run python -m narvl_jax.evaluate'
    f" --workdir={path}, or give a file predictions/NAME.jsonl"
  )


def _split(saved: Saved) -> str:
  return saved.report["split"] if saved.report else ""


def _fit(one: Saved, other: Saved) -> bool:
  """Returns whether all known properties are equal."""
  if one.report is None or other.report is None:
    return True
  keys = ("split", "decoding_name")
  return all(one.report[key] == other.report[key] for key in keys)


def _list(candidates: Sequence[Saved]) -> str:
  return list_few([x.path.stem for x in candidates], 4)
