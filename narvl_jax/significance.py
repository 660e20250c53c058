r"""Tests whether two evaluations differ by more than chance.

  python -m narvl_jax.significance runs/a runs/b [--split=test] [--by=kind,size]
  python -m narvl_jax.significance a/predictions/test-2000-greedy.jsonl \
    b/predictions/test-2000-beam.jsonl [--task=vqa] [--level=0.99]

A and B are run folders or files of predictions that `narvl_jax.evaluate` wrote.
In a folder, the evaluation with the most examples that has the split and
decoding of the other one is used. The examples that both predicted are
resampled together (paired bootstrap).
"""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.evaluation.reporting import GROUPS
from narvl_jax.evaluation.saved import paired
from narvl_jax.evaluation.saved.files import find_pair
from narvl_jax.metrics.bootstrap import DRAWS
from narvl_jax.terminal import progress
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import brief, show


def significance(
  first: str | os.PathLike[str],
  second: str | os.PathLike[str],
  *,
  task: str = "",
  split: str = "",
  level: float = 0.95,
  by: Collection[str] = (),
) -> dict[str, Any]:
  """Compares two evaluations and prints a table.

  Args:
    first: run folder or file of predictions.
    second: the other run folder or file.
    task: the only task to compare; all by default.
    split: split of the evaluations; any by default.
    level: level of the intervals, in (0, 1).
    by: groups of examples that have rows: "kind", "question_type" or "size".

  Returns:
    `first` and `second` (files of predictions), `level`, `draws`, `common`,
    `only_first`, `only_second` (numbers of examples) and `tasks`, see
    `paired.compare`.

  Raises:
    UserError: there are no such evaluations, or they have no example in common.
  """
  if not 0 < level < 1:
    raise UserError(
      f"--level={level:g} must be between 0 and 1, such as --level=0.95"
    )
  for name in by:
    if name not in GROUPS.values():
      raise UserError(
        f'--by="{name}" is unknown.{did_you_mean(name, GROUPS.values())}'
      )
  chosen = find_pair(first, second, split)
  systems = [_of_task(x.predictions(), task, x.path) for x in chosen]
  pairs = paired.match(*systems)
  with progress.doing("resampling"):
    tasks = paired.compare(pairs, level=level, by=by)
  report = {
    "first": str(chosen[0].path),
    "second": str(chosen[1].path),
    "level": level,
    "draws": DRAWS,
    "common": len(pairs.first),
    "only_first": pairs.only_first,
    "only_second": pairs.only_second,
    "tasks": tasks,
  }
  show(format_report(report))
  return report


def _of_task(
  predictions: list[dict[str, Any]], task: str, path: os.PathLike[str]
) -> list[dict[str, Any]]:
  found = [x for x in predictions if task in ("", x["task"])]
  if not found:
    known = {x["task"] for x in predictions}
    raise UserError(
      f'"{path}" has no predictions of --task={task}.'
      f"{did_you_mean(task, known)}"
    )
  return found


def format_report(report: Mapping[str, Any]) -> str:
  """Returns the files, the table and how to read it."""
  lines = [
    f"A: {report['first']}",
    f"B: {report['second']}",
    f"{report['common']:,} examples in both; {report['only_first']:,} only in"
    f" A, {report['only_second']:,} only in B",
    "",
  ]
  level = f"{100 * report['level']:g} % interval"
  heading = ("task", "metric", "examples", "A", "B", "A - B", level, "p-value")
  rows: list[tuple[str, ...]] = [heading]
  for task, entry in report["tasks"].items():
    rows += _rows(task, entry)
    for key in GROUPS:
      for group, part in entry.get(key, {}).items():
        rows += _rows(f"  {brief(group)}", part)
  lines.append(format_columns(rows, left=2))
  images = [x["images"] for x in report["tasks"].values()]
  units = "examples" if None in images else "pictures with all their examples"
  lines += [
    "",
    f"Paired bootstrap, {report['draws']:,} draws of {units}. The interval is"
    " that of A - B.",
  ]
  return "\n".join(lines)


def _rows(label: str, entry: Mapping[str, Any]) -> list[tuple[str, ...]]:
  rows = []
  for name, found in entry["metrics"].items():
    numbers = [
      100 * found[key]
      for key in ("first", "second", "difference", "low", "high")
    ]
    one, other, difference, low, high = numbers
    # CIDEr-D is printed times 100, as in papers, but is not a percentage.
    unit = "" if name.startswith("cider") else " %"
    rows.append(
      (
        *(label, name, str(found["examples"])),
        *(f"{one:.1f}{unit}", f"{other:.1f}{unit}"),
        *(f"{difference:+.1f}", f"[{low:+.1f}, {high:+.1f}]"),
        f"{found['p_value']:.3f}",
      )
    )
  none = (label, "no scores", str(entry["examples"]), *("",) * 5)
  return rows or [none]


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("task", "", "The only task to compare; default: all.")
  common_flags.split("Split of the evaluations; default: any.")
  flags.DEFINE_float("level", 0.95, "Level of the intervals, in (0, 1).")
  flags.DEFINE_list(
    "by", [], f"Compare groups as well: {', '.join(GROUPS.values())}."
  )
  flags.DEFINE_bool("by_kind", False, "The same as --by=kind.")
  common_flags.json()


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  options = flags.FLAGS
  check_json_path(options.json)
  report = significance(
    argv[1],
    argv[2],
    task=options.task,
    split=options.split,
    level=options.level,
    by=[*options.by, *(["kind"] if options.by_kind else [])],
  )
  write_report(options.json, report)


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=2, positional_name="A or B, a run or predictions,")
