"""What an evaluation leaves behind: a table, JSON files, a picture grid."""

import json
import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from narvl_jax.disk import write_text
from narvl_jax.terminal import escape, readable_json

Report = dict[str, Any]
Prediction = dict[str, Any]


def format_table(report: Report) -> str:
  """Returns the report as text: a line per task and one per question kind.

  Metrics are printed in percent, with the number of examples they rest on.
  """
  rows = [("task", "kind", "examples", "metrics")]
  for task, metrics in report["tasks"].items():
    count = str(report["counts"][task])
    rows.append((task, "all", count, _format_metrics(metrics)))
    for kind, entry in report["kinds"].get(task, {}).items():
      count = str(entry["examples"])
      metrics = {k: v for k, v in entry.items() if k != "examples"}
      rows.append(("", escape(kind), count, _format_metrics(metrics)))
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  lines = [
    f"{task:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}  {metrics}"
    for task, kind, count, metrics in rows
  ]
  lines.insert(1, "-" * max(map(len, lines)))
  return "\n".join([heading(report), "", *(line.rstrip() for line in lines)])


def heading(report: Report) -> str:
  """Returns what was evaluated: split, step, decoding and examples.

  A limit on the examples, or on the tasks, is named as well.
  """
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
  """Returns the name, without suffix, of the files of an evaluation.

  Two evaluations share a name only if split, step, decoding, limit and tasks
  are the same; that of all examples and tasks is `SPLIT-STEP-DECODING`.
  """
  parts = [report["split"], report["step"], report.get("decoding_name")]
  if report.get("max_examples"):
    parts.append(f"max{report['max_examples']}")
  parts += report.get("only_tasks") or []
  # A split is named by the data, and may be no name of a file.
  return urllib.parse.quote("-".join(map(str, parts)), safe="")


def _format_metrics(metrics: Mapping[str, float]) -> str:
  if not metrics:
    return "no ground truth"
  return "  ".join(f"{k} {100 * v:5.1f} %" for k, v in metrics.items())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes JSON so that readers see the old or the new file, never a part."""
  text = json.dumps(value, indent=2, allow_nan=False) + "\n"
  write_text(pathlib.Path(path), text)


def write_predictions(
  path: str | os.PathLike[str], predictions: Iterable[Prediction]
) -> None:
  """Writes one JSON object a line, all or nothing."""
  lines = (readable_json(prediction) + "\n" for prediction in predictions)
  write_text(pathlib.Path(path), "".join(lines))


def format_answer(answer: str | Sequence[float] | None) -> str:
  """Returns an answer for people; boxes with whole pixels."""
  if answer is None:
    return "unknown"
  if isinstance(answer, str):
    return answer if answer else "(empty)"
  return ", ".join(f"{x:.0f}" for x in answer)


def select_examples(
  predictions: Sequence[Prediction], per_task: int
) -> list[Prediction]:
  """Picks examples of every task, spread evenly over its kinds and order."""
  by_task: dict[str, dict[str, list[Prediction]]] = {}
  for prediction in predictions:
    kinds = by_task.setdefault(prediction["task"], {})
    kinds.setdefault(prediction["kind"], []).append(prediction)
  chosen = []
  for kinds in by_task.values():
    # One of each kind in turn, so that rare kinds are seen too.
    groups = list(kinds.values())
    longest = max(map(len, groups))
    turns = [g[i] for i in range(longest) for g in groups if i < len(g)]
    chosen += turns[:per_task]
  return chosen
