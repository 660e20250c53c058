"""Tables of the comparison."""

from collections.abc import Mapping
from typing import Any

from narvl_jax.benchmarks.timing import format_megabytes, format_values
from narvl_jax.comparison.ways import BASELINE
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import format_count

_HEADING = (
  "",
  "quality",
  f"minus {BASELINE}",
  "encoder ms",
  "decoder ms (p95)",
  "whole ms (p95)",
  "passes",
  "tokens a pass",
  "temp MB",
  "decoder x",
  "whole x",
)


_LEGEND = (
  "ms: medians of {rounds}, the 95th percentile in brackets",
  "passes: runs of the decoder for a batch; tokens a pass: with eos",
  "temp MB: temporary memory of the decoder",
)
_LEGEND_OF_ESTIMATES = (
  "ms: estimates of the compiler; decoder GB: read and written",
  "passes: runs of the decoder for a batch; tokens a pass: with eos",
)
_RATIOS = f"decoder x, whole x: time over that of {BASELINE}"


def format_report(report: Mapping[str, Any]) -> str:
  """Returns a table for each task and batch size.

  "decoder x" and "whole x" are times over those of `BASELINE`; "tokens a pass"
  counts eos. Differences have 95 % intervals of a paired bootstrap.
  """
  facts = {**report["environment"], "dtype": report["dtype"]}
  parts = [
    f"{report['date']} " + format_values(facts),
    *(
      f"{kind}: " + format_values(entry)
      for kind, entry in report["models"].items()
    ),
  ]
  for task, entry in report["tasks"].items():
    sizes = report["batch_sizes"] if report["latency"] else [None]
    table = _estimates if report.get("topology") else _table
    for size in sizes:
      parts += ["", _title(task, entry, size), "", table(entry, size)]
    parts += _reasons(entry)
  if report["tasks"]:
    parts += ["", *_legend(report)]
  if report.get("lengths"):
    parts += ["", _lengths(report["lengths"])]
  return "\n".join(parts)


def _legend(report: Mapping[str, Any]) -> list[str]:
  """Returns what the columns of the tables mean."""
  if report.get("topology"):
    return [*_LEGEND_OF_ESTIMATES, _RATIOS]
  lines = [
    f"minus {BASELINE}: difference on the same examples, in points, with its"
    " 95 % interval"
  ]
  if report["latency"]:
    rounds = format_count(report["rounds"], "round")
    lines += [line.format(rounds=rounds) for line in (*_LEGEND, _RATIOS)]
  return lines


def _title(task: str, entry: Mapping[str, Any], size: int | None) -> str:
  facts = {} if size is None else {"batch": size, **entry["facts"]}
  return f"{task}: {format_values(facts)}".rstrip()


def _table(entry: Mapping[str, Any], size: int | None) -> str:
  rows: list[tuple[str, ...]] = [_HEADING]
  for label, way in entry["ways"].items():
    if "not_applicable" in way:
      rows.append((label, "n/a", *("",) * (len(_HEADING) - 2)))
      continue
    times = way.get("latency", {}).get(str(size))
    rows.append((label, _quality(way), _difference(way), *_times(times)))
  return format_columns(rows)


def _estimates(entry: Mapping[str, Any], size: int | None) -> str:
  """Returns a table of estimates for a chip; see `compiled.estimate`."""
  rows: list[tuple[str, ...]] = [
    (
      *("", "encoder ms", "decoder ms", "passes", "tokens a pass"),
      *("decoder GB", "decoder x", "whole x"),
    )
  ]
  for label, way in entry["ways"].items():
    if "not_applicable" in way:
      rows.append((label, "n/a", *("",) * 6))
      continue
    found = way["estimates"][str(size)]
    rows.append(
      (
        label,
        *(f"{found[key]:.2f}" for key in ("encoder_ms", "decoder_ms")),
        f"{found['passes']:.0f}",
        f"{found['tokens_per_pass']:.1f}",
        f"{found['decoder_bytes'] / 1e9:.2f}",
        *(f"{found[key]:.2f}" for key in ("decoder_ratio", "whole_ratio")),
      )
    )
  return format_columns(rows)


def _quality(way: Mapping[str, Any]) -> str:
  metrics = way.get("quality", {}).get("metrics")
  if not metrics:
    return "-"
  name, value = next(iter(metrics.items()))
  return f"{name} {100 * value:.1f} %"


def _difference(way: Mapping[str, Any]) -> str:
  """Returns the difference of the main metric with its interval, in points."""
  found = way.get("quality", {}).get("difference")
  if not found:
    return "-"
  main = next(iter(found.values()))
  value, low, high = (100 * main[key] for key in ("difference", "low", "high"))
  return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _times(times: Mapping[str, Any] | None) -> tuple[str, ...]:
  if times is None:
    return ("-",) * (len(_HEADING) - 3)
  return (
    f"{times['encoder_ms']['median']:.1f}",
    *(
      f"{times[key]['median']:.1f} ({times[key]['p95']:.1f})"
      for key in ("decoder_ms", "whole_ms")
    ),
    f"{times['passes']:.1f}",
    f"{times['tokens_per_pass']:.1f}",
    format_megabytes(times["memory"].get("temp")),
    f"{times['decoder_ratio']:.2f}",
    f"{times['whole_ratio']:.2f}",
  )


def _reasons(entry: Mapping[str, Any]) -> list[str]:
  return [
    f"{label}: n/a, {way['not_applicable']}"
    for label, way in entry["ways"].items()
    if "not_applicable" in way
  ]


def _lengths(lengths: Mapping[str, Any]) -> str:
  """Returns a table of median decoder times by length of the answer."""
  counts = next(iter(lengths["curves"].values()))["lengths"]
  rows = [("decoder ms at tokens", *map(str, counts))]
  for label, curve in lengths["curves"].items():
    rows.append((label, *(f"{x:.1f}" for x in curve["decoder_ms"])))
  return f"{lengths['task']}: batch={lengths['batch']}\n\n" + format_columns(
    rows
  )
