"""What the benchmarks share: interleaved timing, a table, a JSON file."""

import dataclasses
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Timing:
  """Times of one candidate.

  Attributes:
    seconds: wall time of a call, one entry per round.
    cpu_share: CPU time of this process over wall time; far below the number
      of threads at work when other programs hold the cores.
  """

  seconds: np.ndarray
  cpu_share: float


def measure(
  candidates: Mapping[str, Callable[[], Any]], *, rounds: int, calls: int = 3
) -> dict[str, Timing]:
  """Times candidates in turn, so that a busy machine slows all of them.

  A round runs every candidate once unmeasured, as memory that another one
  has just given back costs more to get, and then `calls` times; its figure
  is the mean of these. The order is reversed in every other round.

  Args:
    candidates: name -> function of no arguments; results are waited for.
    rounds: at least 1.
    calls: measured calls per round, at least 1.

  Returns:
    Name -> times, in the order given.
  """
  for run in candidates.values():
    jax.block_until_ready(run())
  wall = {name: np.zeros(rounds) for name in candidates}
  cpu = dict.fromkeys(candidates, 0.0)
  for i in range(rounds):
    for name, run in list(candidates.items())[:: -1 if i % 2 else 1]:
      jax.block_until_ready(run())
      cpu_start, start = time.process_time(), time.perf_counter()
      for _ in range(calls):
        jax.block_until_ready(run())
      wall[name][i] = (time.perf_counter() - start) / calls
      cpu[name] += (time.process_time() - cpu_start) / calls
  return {
    name: Timing(wall[name], cpu[name] / max(wall[name].sum(), 1e-9))
    for name in candidates
  }


def peak_memory(run: Callable[[], Result]) -> tuple[int | None, Result]:
  """Returns by how much the resident memory rose at most, and the result.

  Bytes, None where the system does not tell them (Linux does).
  """
  before = None
  try:
    # Sets the high-water mark of this process to what it uses now.
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
  except OSError:
    pass
  result = run()
  return (None if before is None else _resident("VmHWM") - before), result


def _resident(key: str) -> int:
  """Returns bytes from the line of a key in /proc/self/status."""
  status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
  match = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
  assert match is not None
  return 1024 * int(match.group(1))


def spread(values: np.ndarray) -> dict[str, float]:
  """Returns the median, the minimum and the maximum."""
  return {
    "median": float(np.median(values)),
    "min": float(np.min(values)),
    "max": float(np.max(values)),
  }


def format_spread(values: Mapping[str, float], digits: int = 1) -> str:
  """Returns "median (min..max)"."""
  median, low, high = (
    f"{values[key]:.{digits}f}" for key in ("median", "min", "max")
  )
  return f"{median} ({low}..{high})"


def format_table(rows: Sequence[Sequence[str]]) -> str:
  """Aligns rows of text; the first row is the heading."""
  widths = [
    max(len(cell) for cell in column) for column in zip(*rows, strict=True)
  ]
  lines = [
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  lines.insert(1, "-" * max(len(line) for line in lines))
  return "\n".join(lines)


def environment() -> dict[str, Any]:
  """Returns the versions and the hardware that the times depend on."""
  return {
    "jax": jax.__version__,
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
    "cpus": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count(),
  }


def format_megabytes(count: int | None) -> str:
  """Returns bytes in megabytes, a dash if they are not known."""
  return "-" if count is None else f"{count / 1e6:.1f}"


def format_report(
  title: str,
  report: Mapping[str, Any],
  columns: Mapping[str, Callable[[Mapping[str, Any]], str]],
) -> str:
  """Returns the report of a benchmark as a table for people.

  Args:
    title: what was timed.
    report: sizes, rounds, environment, logits_bytes and `results`, name ->
      what was measured, with milliseconds, ratio and the two differences.
    columns: heading -> text from a result; they come before the differences.
  """
  rows = [
    [
      *("", "ms, median (min..max)", "ratio", *columns),
      *("loss diff", "grad diff"),
    ]
  ]
  for name, result in report["results"].items():
    rows.append(
      [
        name,
        format_spread(result["milliseconds"]),
        format_spread(result["ratio"], 2),
        *(column(result) for column in columns.values()),
        f"{result['loss_difference']:.0e}",
        f"{result['gradient_difference']:.0e}",
      ]
    )
  facts = {**report["sizes"], "rounds": report["rounds"]}
  return "\n".join(
    [
      f"{title}: " + " ".join(f"{k}={v}" for k, v in facts.items()),
      " ".join(f"{k}={v}" for k, v in report["environment"].items()),
      f"logits {format_megabytes(report['logits_bytes'])} MB",
      "",
      format_table(rows),
    ]
  )
