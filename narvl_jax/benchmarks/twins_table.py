"""Results of twins: a file with one JSON object per line, and its table."""

import fcntl
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.evaluation.metrics import metric_names

# Kind of run -> heading.
KINDS = {"ar": "AR", "nar": "NAR", "distilled": "NAR distilled"}
# The decoding is chosen on this split.
CHOICE_SPLIT = "validation"
_MISSING = "not measured"

# "data", "kind", "seed"; facts of the run; "results": split -> decoding ->
# task -> metric -> value in [0, 1].
Row = dict[str, Any]
Key = tuple[str, str, int]


def key_of(row: Row) -> Key:
  """Returns data, kind and seed, which identify a row."""
  return row["data"], row["kind"], row["seed"]


def read_rows(path: pathlib.Path) -> dict[Key, Row]:
  """Returns the rows of a file; an incomplete last line is ignored.

  Raises:
    UserError: the file cannot be read, or another line is not a result.
  """
  if not path.exists():
    return {}
  try:
    return _parse(path.read_text(encoding="utf-8"), path)
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f'cannot read the results "{path}": {error} (--results)'
    ) from error


def append_row(path: pathlib.Path, row: Row) -> None:
  """Appends a result unless the file has it; safe for several processes.

  Raises:
    UserError: the file cannot be written, or a line is not a result.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      file.seek(0)
      content = file.read()
      if key_of(row) in _parse(content.decode(), path):
        return
      # Removes an incomplete line of a killed process.
      file.truncate(content.rfind(b"\n") + 1)
      file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise UserError(
      f'cannot write the results "{path}": {error} (--results)'
    ) from error


def _parse(text: str, path: pathlib.Path) -> dict[Key, Row]:
  *lines, _ = text.split("\n")
  rows = {}
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      rows[key_of(row)] = row
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'line {number} of "{path}" is not a result of twins: {error!r}; remove'
        " the line, or choose another --results"
      ) from error
  return rows


def format_table(
  rows: Mapping[Key, Row],
  tasks: Mapping[str, Sequence[str]],
  splits: Mapping[str, Sequence[str]],
) -> str:
  """Returns a Markdown table of AR models and their twins.

  Args:
    rows: of `read_rows`.
    tasks: data -> its tasks.
    splits: data -> the splits to show.
  """
  differences = ("NAR - AR", "distilled - AR")
  lines = [
    ["data, split", "task, metric", *KINDS.values(), *differences, "seeds"]
  ]
  for data, names in tasks.items():
    for split in splits[data]:
      lines += [_line(rows, data, split, task) for task in names]
  table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  head, body = table.split("\n", 1)
  rule = "| " + " | ".join("---" for _ in lines[0]) + " |"
  return "\n".join([head, rule, body, "", *_notes(rows, tasks)])


def _line(
  rows: Mapping[Key, Row], data: str, split: str, task: str
) -> list[str]:
  scores = {}
  cells = []
  for kind in KINDS:
    found = [r for k, r in rows.items() if k[:2] == (data, kind)]
    method = best_method(found, task)
    scores[kind] = {
      row["seed"]: 100 * _score(row, split, method, task)
      for row in found
      if method is not None
    }
    values = list(scores[kind].values())
    cells.append(f"{_spread(values)} {method}" if values else _MISSING)
  for kind in ("nar", "distilled"):
    common = sorted(scores[kind].keys() & scores["ar"].keys())
    values = [scores[kind][seed] - scores["ar"][seed] for seed in common]
    cells.append(_spread(values, "+.1f") if values else _MISSING)
  counts = [len(scores[kind]) for kind in KINDS]
  seeds = " / ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
  return [f"{data}, {split}", f"{task}, {metric_names(task)[0]}", *cells, seeds]


def best_method(rows: Sequence[Row], task: str) -> str | None:
  """Returns the decoding with the best mean on the validation split.

  The first of equal ones is chosen; None if there are no rows.
  """
  if not rows:
    return None
  common = [
    method
    for method in rows[0]["results"][CHOICE_SPLIT]
    if all(method in row["results"][CHOICE_SPLIT] for row in rows)
  ]
  means = {
    method: float(
      np.mean([_score(row, CHOICE_SPLIT, method, task) for row in rows])
    )
    for method in common
  }
  return max(means, key=means.__getitem__)


def _score(row: Row, split: str, method: str, task: str) -> float:
  return row["results"][split][method][task][metric_names(task)[0]]


def _spread(values: Sequence[float], form: str = ".1f") -> str:
  mean, low, high = np.mean(values), min(values), max(values)
  return f"{mean:{form}} ({low:{form}}..{high:{form}})"


def _notes(
  rows: Mapping[Key, Row], tasks: Mapping[str, Sequence[str]]
) -> list[str]:
  """Returns lines about the figures and the runs."""
  lines = [
    "Per cent, mean (least..most) over seeds, and the decoding, chosen on the"
    f" {CHOICE_SPLIT} split. Differences in points, of pairs of equal seed.",
  ]
  for data in tasks:
    runs = {
      f"{row['steps']} steps of {row['batch_size']}, {row['device']}, jax"
      f" {row['jax']}, {row['date']}"
      for key, row in rows.items()
      if key[0] == data
    }
    lines += [f"{data}: {run}" for run in sorted(runs)]
  return lines
