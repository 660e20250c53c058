"""Interleaved timing, peak memory and tables for benchmarks."""

import dataclasses
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from narvl_jax.terminal.tables import format_columns

Result = TypeVar("Result")
Candidate = TypeVar("Candidate")


@dataclasses.dataclass(frozen=True)
class Timing:
  """Times of one candidate.

  Attributes:
    seconds: wall time of a call, float [rounds].
    cpu_seconds: CPU time of this process, float [rounds].
  """

  seconds: np.ndarray
  cpu_seconds: np.ndarray

  @property
  def cpu_share(self) -> float:
    """CPU time over wall time.

    It is far below the number of threads if other programs occupy the cores.
    """
    return self.cpu_seconds.sum() / max(self.seconds.sum(), 1e-9)


def turns(
  candidates: Mapping[Any, Candidate], rounds: int
) -> Iterator[tuple[int, Any, Candidate]]:
  """Yields (round, name, candidate), every other round in reverse order."""
  for i in range(rounds):
    for name, candidate in list(candidates.items())[:: -1 if i % 2 else 1]:
      yield i, name, candidate


def measure(
  candidates: Mapping[Any, Callable[[], Any]], *, rounds: int, calls: int = 3
) -> dict[Any, Timing]:
  """Times candidates in turn, so that other load slows all of them alike.

  Each round calls every candidate once without measuring, because memory that
  another one has just released is slow to allocate, and then `calls` times;
  the figure of the round is their mean. Every other round has the reverse
  order.

  Args:
    candidates: name -> function without arguments; results are waited for.
    rounds: at least 1.
    calls: measured calls per round, at least 1.

  Returns:
    Name -> times.
  """
  for run in candidates.values():
    jax.block_until_ready(run())
  wall = {name: np.zeros(rounds) for name in candidates}
  cpu = {name: np.zeros(rounds) for name in candidates}
  for i, name, run in turns(candidates, rounds):
    jax.block_until_ready(run())
    cpu_start, start = time.process_time(), time.perf_counter()
    for _ in range(calls):
      jax.block_until_ready(run())
    wall[name][i] = (time.perf_counter() - start) / calls
    cpu[name][i] = (time.process_time() - cpu_start) / calls
  return {name: Timing(wall[name], cpu[name]) for name in candidates}


def peak_memory(run: Callable[[], Result]) -> tuple[int | None, Result]:
  """Returns the peak of resident memory above its start, and the result.

  The peak is in bytes; None on systems other than Linux.
  """
  before = None
  try:
    # Resets the high-water mark to the current size.
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
  except OSError:
    pass
  result = run()
  return (None if before is None else _resident("VmHWM") - before), result


def _resident(key: str) -> int:
  """Returns the bytes of a key in /proc/self/status."""
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


def environment() -> dict[str, Any]:
  """Returns versions and hardware."""
  return {
    "jax": jax.__version__,
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
    "cpus": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count(),
  }


def format_megabytes(count: int | None) -> str:
  """Returns bytes in megabytes; "-" for None."""
  return "-" if count is None else f"{count / 1e6:.1f}"


def format_facts(title: str, report: Mapping[str, Any]) -> list[str]:
  """Returns a line of sizes and one of the environment."""
  facts = {**report["sizes"], "rounds": report["rounds"]}
  return [
    f"{title}: {format_values(facts)}",
    format_values(report["environment"]),
  ]


def format_values(values: Mapping[str, Any]) -> str:
  """Returns "name=value name=value"."""
  return " ".join(f"{name}={value}" for name, value in values.items())


def format_spreads(
  head: str, unit: str, spreads: Mapping[str, Mapping[str, float]], digits: int
) -> str:
  """Returns a table with a row for each named spread."""
  rows = [[head, f"{unit}, median (min..max)"]]
  rows += [[name, format_spread(x, digits)] for name, x in spreads.items()]
  return format_columns(rows)
