"""Reports of an evaluation: tables, file names, JSON files."""

import os
import pathlib
import textwrap
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from narvl_jax.files.disk import write_text
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import brief, readable_json

Report = dict[str, Any]
Prediction = dict[str, Any]

# Key of the report -> key of the predictions by which it groups a task.
GROUPS = {"kinds": "kind", "question_types": "question_type", "sizes": "size"}
# Columns of the lines below a table.
_WIDTH = 100
POPE_FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def format_table(
  report: Report,
  notes: Mapping[str, str] | None = None,
  *,
  kinds: bool = True,
) -> str:
  """Returns the heading and the tables of a report."""
  parts = [heading(report), format_metrics(report, notes, kinds=kinds)]
  for task, table in report.get("confusion", {}).items():
    parts.append(_format_confusion(task, table))
  for task, subsets in report.get("pope", {}).items():
    parts.append(_format_pope(task, subsets))
  return "\n\n".join(parts)


def heading(report: Report) -> str:
  """Returns split, step, decoding, examples and limits in one line."""
  step = "no step" if report["step"] is None else f"step {report['step']}"
  parts = [
    report["split"],
    step,
    report.get("decoding_name", "greedy"),
    f"{report['examples']} examples",
  ]
  if bad := sum(_records(report).values()) - report["examples"]:
    parts.append(f"{bad} bad records count as wrong")
  if report.get("max_examples"):
    parts.append(f"at most {report['max_examples']} of each data set")
  if report.get("only_tasks"):
    parts.append(f"only {' and '.join(report['only_tasks'])}")
  return ", ".join(parts)


def _records(report: Report) -> dict[str, int]:
  """Returns the number of examples and bad records of each task."""
  found = dict.fromkeys(report["counts"], 0)
  for entry in report.get("datasets", {}).values():
    found[entry["task"]] += entry.get("records", entry["examples"])
  # Reports of earlier versions may lack the data sets.
  return {x: max(found[x], count) for x, count in report["counts"].items()}


def scored(report: Report, task: str) -> str:
  """Returns the number of predictions, out of all records if some are bad."""
  count, total = report["counts"][task], _records(report)[task]
  return str(count) if count == total else f"{count} / {total}"


def file_name(report: Report) -> str:
  """Returns the stem of the files of an evaluation.

  It is `SPLIT-STEP-DECODING`, followed by the limit and the tasks if not all
  examples or tasks were evaluated, by "all" with all metrics, and by
  "cider_df" and "annotations" with other references.
  """
  parts = [report["split"], report["step"], report.get("decoding_name")]
  if report.get("max_examples"):
    parts.append(f"max{report['max_examples']}")
  parts += report.get("only_tasks") or []
  if report.get("metrics") == "all":
    parts.append("all")
  parts += [key for key in ("cider_df", "annotations") if report.get(key)]
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
  """Returns a table with a row per task, question kind and size of boxes.

  Values are in percent, with half of the confidence interval where the report
  has intervals. CIDEr, which is not a share, is printed times 100.

  Args:
    report: report of `evaluate_tasks`.
    notes: task -> remark at the end of its row.
    kinds: whether question kinds and sizes have rows.
    indent: begins every line.
  """
  rows = []
  for task, metrics in report["tasks"].items():
    note = (notes or {}).get(task) if metrics else "no ground truth"
    bounds = report.get("intervals", {}).get(task, {})
    rows.append((task, scored(report, task), metrics, bounds, note))
    if not kinds:
      continue
    for key in ("kinds", "sizes"):
      for group, entry in report.get(key, {}).get(task, {}).items():
        bounds = entry.get("intervals", {})
        rest = {x: entry[x] for x in metrics if x in entry}
        rows.append((f"  {brief(group)}", entry["examples"], rest, bounds, ""))
  names = list(dict.fromkeys(name for row in rows for name in row[2]))
  cells = [("task", "examples", *names)]
  for label, count, metrics, bounds, _ in rows:
    shown = [
      _format_value(name, metrics[name], bounds.get(name))
      if name in metrics
      else ""
      for name in names
    ]
    cells.append((label, str(count), *shown))
  shown = [f"({note})" if note else "" for *_, note in rows]
  lines = [format_columns(cells, indent=indent, notes=shown)]
  for task, reasons in report.get("unavailable", {}).items():
    lines += [
      textwrap.fill(
        f"{task}: {line}",
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
      )
      for line in _why_unavailable(reasons)
    ]
  return "\n".join(lines)


def _format_value(
  name: str, value: float, bounds: Sequence[float] | None
) -> str:
  text = f"{100 * value:.1f}"
  if bounds:
    text += f" ± {50 * (bounds[1] - bounds[0]):.1f}"
  return text if name.startswith("cider") else f"{text} %"


def _why_unavailable(reasons: Mapping[str, str]) -> list[str]:
  """Returns a line for each reason for which figures are unavailable."""
  names: dict[str, list[str]] = {}
  for name, reason in reasons.items():
    names.setdefault(reason, []).append(name)
  return [f"{', '.join(x)} unavailable: {why}" for why, x in names.items()]


def _format_confusion(task: str, table: Mapping[str, Any]) -> str:
  labels, figures = table["classes"], ("precision", "recall", "f1")
  cells = [[f"{task}: truth", *labels, "other", *figures]]
  for label, counts in zip(labels, table["counts"], strict=True):
    of_label = table["per_class"][label]
    shown = (_percent(of_label, name) for name in figures)
    cells.append([label, *map(str, counts), *shown])
  return format_columns(cells)


def _format_pope(task: str, subsets: Mapping[str, Any]) -> str:
  cells = [[f"{task}: POPE", "examples", *POPE_FIGURES]]
  for subset, figures in subsets.items():
    shown = (_percent(figures, name) for name in POPE_FIGURES)
    cells.append([subset, str(figures["examples"]), *shown])
  return format_columns(cells)


def _percent(figures: Mapping[str, Any], name: str) -> str:
  bounds = figures.get("intervals", {}).get(name)
  value = figures[name]
  return "-" if value is None else _format_value(name, value, bounds)


def write_predictions(
  path: str | os.PathLike[str],
  predictions: Iterable[Prediction],
  *,
  inside: pathlib.Path | None = None,
) -> None:
  """Writes one JSON object per line, atomically."""
  lines = (readable_json(prediction) + "\n" for prediction in predictions)
  write_text(as_path(path), "".join(lines), inside=inside)


def format_answer(answer: str | Sequence[float] | None) -> str:
  """Returns an answer as text; boxes have whole pixels."""
  if answer is None:
    return "unknown"
  if isinstance(answer, str):
    return answer if answer else "(empty)"
  return ", ".join(f"{x:.0f}" for x in answer)


def confidence(prediction: Prediction) -> float:
  """Returns the probability that an answer is right, see `Answer`."""
  if "raw_probability" in prediction:
    return prediction["probability"]
  return prediction.get("probability_iou50", prediction["probability"])


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
