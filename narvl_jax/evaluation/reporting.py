"""Reports of an evaluation: tables, file names, JSON files."""

import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from narvl_jax.files.disk import write_text
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import brief, readable_json

Report = dict[str, Any]
Prediction = dict[str, Any]


def format_table(
  report: Report,
  notes: Mapping[str, str] | None = None,
  *,
  kinds: bool = True,
) -> str:
  """Returns the heading and the table of `format_metrics`."""
  return f"{heading(report)}\n\n{format_metrics(report, notes, kinds=kinds)}"


def heading(report: Report) -> str:
  """Returns split, step, decoding, examples and limits in one line."""
  step = "no step" if report["step"] is None else f"step {report['step']}"
  parts = [
    report["split"],
    step,
    report.get("decoding_name", "greedy"),
    f"{report['examples']} examples",
  ]
  if report.get("max_examples"):
    parts.append(f"at most {report['max_examples']} of each data set")
  if report.get("only_tasks"):
    parts.append(f"only {' and '.join(report['only_tasks'])}")
  return ", ".join(parts)


def file_name(report: Report) -> str:
  """Returns the stem of the files of an evaluation.

  It is `SPLIT-STEP-DECODING`, followed by the limit and the tasks if not all
  examples or tasks were evaluated.
  """
  parts = [report["split"], report["step"], report.get("decoding_name")]
  if report.get("max_examples"):
    parts.append(f"max{report['max_examples']}")
  parts += report.get("only_tasks") or []
  # The data name their splits, which need not be valid file names.
  name = "-".join(map(str, parts))
  return urllib.parse.quote(name, safe="", errors="backslashreplace")


def format_metrics(
  report: Report,
  notes: Mapping[str, str] | None = None,
  *,
  kinds: bool = True,
  indent: str = "",
) -> str:
  """Returns a table with a row per task and question kind, in percent.

  Args:
    report: of `evaluate_tasks`.
    notes: task -> remark at the end of its row.
    kinds: whether question kinds have rows.
    indent: begins every line.
  """
  rows = []
  for task, metrics in report["tasks"].items():
    rows.append((task, report["counts"][task], metrics))
    for kind, entry in report["kinds"].get(task, {}).items() if kinds else ():
      rest = {k: v for k, v in entry.items() if k != "examples"}
      rows.append((f"  {brief(kind)}", entry["examples"], rest))
  names = list(dict.fromkeys(name for *_, found in rows for name in found))
  cells = [("task", "examples", *names)]
  for label, count, metrics in rows:
    shown = [
      f"{100 * metrics[name]:.1f} %" if name in metrics else ""
      for name in names
    ]
    cells.append((label, str(count), *shown))
  found = [
    (notes or {}).get(label) if metrics else "no ground truth"
    for label, _, metrics in rows
  ]
  tails = [f"({note})" if note else "" for note in found]
  return format_columns(cells, indent=indent, notes=tails)


def write_predictions(
  path: str | os.PathLike[str],
  predictions: Iterable[Prediction],
  *,
  inside: pathlib.Path | None = None,
) -> None:
  """Writes one JSON object per line, atomically."""
  lines = (readable_json(prediction) + "\n" for prediction in predictions)
  write_text(pathlib.Path(path), "".join(lines), inside=inside)


def format_answer(answer: str | Sequence[float] | None) -> str:
  """Returns an answer as text; boxes have whole pixels."""
  if answer is None:
    return "unknown"
  if isinstance(answer, str):
    return answer if answer else "(empty)"
  return ", ".join(f"{x:.0f}" for x in answer)


def select_examples(
  predictions: Sequence[Prediction], per_task: int
) -> list[Prediction]:
  """Returns at most `per_task` examples of every task, of all kinds."""
  by_task: dict[str, dict[str, list[Prediction]]] = {}
  for prediction in predictions:
    kinds = by_task.setdefault(prediction["task"], {})
    kinds.setdefault(prediction["kind"], []).append(prediction)
  chosen = []
  for kinds in by_task.values():
    # One of each kind in turn, so that rare kinds are shown, too.
    groups = list(kinds.values())
    longest = max(map(len, groups))
    turns = [g[i] for i in range(longest) for g in groups if i < len(g)]
    chosen += turns[:per_task]
  return chosen
