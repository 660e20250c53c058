"""Tables of an evaluation and of a calibration, for the page of a run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from narvl_jax.evaluation import reporting
from narvl_jax.inspection import markup
from narvl_jax.inspection.markup import Markup, element

# Groups of examples that reports may have, and their names on the page.


def evaluation(report: Mapping[str, Any]) -> Markup:
  """Returns heading, figures and confusion matrices of a report.

  Args:
    report: report of `evaluate_tasks`, of this or an earlier version.
  """
  parts: list[object] = [element("p", reporting.heading(dict(report)))]
  for task, figures in report["tasks"].items():
    parts.append(element("p", task, class_="task"))
    parts.append(_figures(report, task, figures))
  for task, table in report.get("confusion", {}).items():
    parts.append(element("p", f"{task}: truth in rows, answers in columns"))
    parts.append(_confusion(table))
    parts.append(
      _rows(table.get("per_class", {}), ("precision", "recall", "f1"))
    )
  for task, subsets in report.get("pope", {}).items():
    parts.append(element("p", f"{task}: POPE"))
    parts.append(_rows(subsets, reporting.POPE_FIGURES))
  return markup.join(parts)


def _figures(
  report: Mapping[str, Any], task: str, figures: Mapping[str, float]
) -> Markup:
  bounds = report.get("intervals", {}).get(task, {})
  count = reporting.scored(dict(report), task)
  groups = {"all": {**figures, "examples": count, "intervals": bounds}}
  for key in reporting.GROUPS:
    groups |= report.get(key, {}).get(task, {})
  table = _rows(groups, list(figures))
  reasons = report.get("unavailable", {}).get(task, {})
  notes = (
    element("p", f"{name}: unavailable ({why})", class_="faint")
    for name, why in reasons.items()
  )
  note = () if figures else (markup.missing("no ground truth"),)
  return markup.join([table, *notes, *note])


def _rows(
  groups: Mapping[str, Mapping[str, Any]], names: Sequence[str]
) -> Markup:
  """Returns a table of figures with their intervals, a row for each group."""
  if not groups:
    return markup.join(())
  rows = []
  for label, entry in groups.items():
    known = entry.get("intervals", {})
    shown = (_figure(x, entry.get(x), known.get(x)) for x in names)
    rows.append((label, entry["examples"], *shown))
  return markup.table(rows, ("", "examples", *names))


def _figure(
  name: str, value: float | None, bounds: Sequence[float] | None
) -> str:
  """Returns a figure in percent, with its interval; CIDEr is not a share."""
  if value is None:
    return ""
  text = f"{100 * value:.1f}" + ("" if name.startswith("cider") else " %")
  if bounds:
    text += f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"
  return text


def _confusion(table: Mapping[str, Any]) -> Markup:
  labels = table["classes"]
  counts = table["counts"]
  most = max((max(row) for row in counts), default=0) or 1
  rows = [element("tr", *(element("th", x) for x in ("", *labels, "other")))]
  for label, row in zip(labels, counts, strict=True):
    cells = (
      element(
        "td",
        count,
        style=f"background: rgba(var(--mark), {0.6 * count / most:.2f})",
      )
      for count in row
    )
    rows.append(element("tr", element("th", label), *cells))
  return element("table", *rows, class_="cells")


def calibration(values: Mapping[str, Any]) -> Markup:
  """Returns a table with a row for each number of a calibration."""
  return markup.table(_flat(values), ("", "value"))


def _flat(
  values: Mapping[str, Any], prefix: str = ""
) -> Iterable[tuple[str, str]]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name} / ")
    elif isinstance(value, float):
      yield f"{prefix}{name}", f"{value:.4g}"
    else:
      yield f"{prefix}{name}", str(value)
