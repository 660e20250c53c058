"""Times the first batch, and reading from a store; measures memory."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import pickle
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from narvl_jax.benchmarks import data_load, timing
from narvl_jax.data.sources.rows.files import RowFile
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.tables import format_columns

_BLOCK = 1 << 23
# Rows of the memory table; the first follows the first batches.
_POINTS = 10
LOCAL, STORE = "local", "store"


def first_batch(
  load: data_load.Load, path: pathlib.Path | None, *, rounds: int
) -> dict[str, Any]:
  """Times a fresh process until its first batch, and the index of rows.

  Args:
    load: what is read.
    path: a generated file to open each time; None: the sources of `load` are
      pickled, as for worker processes.
    rounds: number of measurements.

  Returns:
    The content of `--json`.
  """
  seconds = np.array([_in_fresh_process(load, path) for _ in range(rounds)])
  results = {
    "open the source": timing.spread(seconds[:, 0]),
    f"first batch of {load.batch_size}": timing.spread(seconds[:, 1]),
    "both": timing.spread(seconds.sum(1)),
  }
  report = {
    "benchmark": "data: first batch",
    "records": sum(len(entry.source) for entry in load.entries),
    "environment": timing.environment(),
    "seconds": results,
  }
  if path is not None:
    report["index"] = _index_speed(path, rounds)
  return report


def _in_fresh_process(
  load: data_load.Load, path: pathlib.Path | None
) -> tuple[float, float]:
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    # Twice: the first call imports the libraries.
    pool.submit(os.getpid).result()
    return pool.submit(_time_first_batch, pickle.dumps(load), path).result()


def _time_first_batch(
  pickled: bytes, path: pathlib.Path | None
) -> tuple[float, float]:
  """Returns seconds to open and to the batch; called in the fresh process."""
  load: data_load.Load = pickle.loads(pickled)
  start = time.perf_counter()
  if path is not None:
    source = data_load.open_tsv(path)
    load.entries[0] = load.entries[0]._replace(source=source)
  opened = time.perf_counter()
  batches = load.batches(0, threads=2, prefetch=2)
  next(batches)
  done = time.perf_counter()
  batches.close()
  return opened - start, done - opened


def _index_speed(path: pathlib.Path, rounds: int) -> dict[str, Any]:
  """Builds the index and reads the file, in turns, in GB per second."""
  folder = path.parent / "index_timing"
  size = path.stat().st_size
  speeds = {"build the index": np.zeros(rounds), "read alone": np.zeros(rounds)}
  _read_all(path)
  for i in range(rounds):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start = time.perf_counter()
    RowFile(path, str(folder))
    middle = time.perf_counter()
    _read_all(path)
    speeds["build the index"][i] = size / 1e9 / (middle - start)
    speeds["read alone"][i] = size / 1e9 / (time.perf_counter() - middle)
  shutil.rmtree(folder, ignore_errors=True)
  return {
    "file_gb": size / 1e9,
    **{name: timing.spread(values) for name, values in speeds.items()},
  }


def _read_all(path: pathlib.Path) -> None:
  block = bytearray(_BLOCK)
  with path.open("rb", buffering=0) as file:
    while file.readinto(block):
      pass


def format_first_batch(report: dict[str, Any]) -> str:
  """Returns the report as text."""
  environment = timing.format_values(report["environment"])
  parts = [
    f"first batch: records={report['records']}\n{environment}",
    timing.format_spreads("", "seconds", report["seconds"], 3),
  ]
  index = dict(report.get("index", {}))
  if index:
    head = f"file of {index.pop('file_gb'):.3f} GB"
    parts.append(timing.format_spreads(head, "GB/s", index, 2))
  return "\n\n".join(parts)


def memory(
  load: data_load.Load, workers: Sequence[int], *, examples: int
) -> dict[str, Any]:
  """Measures resident memory while examples are read.

  Args:
    load: what is read.
    workers: numbers of processes to try.
    examples: number of examples for each.

  Returns:
    The content of `--json`: bytes of this process and of its workers.
  """
  results = {}
  for number in workers:
    batches = load.batches(number, threads=load.num_threads, prefetch=2)
    steps = max(1, examples // load.batch_size)
    # Buffers are full after these steps.
    first = min(steps, 8 * max(number, 1))
    points = set(np.linspace(first, steps, _POINTS).astype(int).tolist())
    table = []
    for step in range(1, steps + 1):
      next(batches)
      if step in points:
        own, children = data_load.memory_bytes()
        table.append(
          {"examples": step * load.batch_size, "own": own, "workers": children}
        )
    batches.close()
    results[str(number)] = table
  return {
    "benchmark": "data: memory",
    "environment": timing.environment(),
    "results": results,
  }


def format_memory(report: dict[str, Any]) -> str:
  """Returns a table for each number of workers."""
  parts = [timing.format_values(report["environment"])]
  for number, table in report["results"].items():
    rows = [["examples", "this process MB", "workers MB", "growth MB"]]
    for row in table:
      total, first = (x["own"] + x["workers"] for x in (row, table[0]))
      rows.append(
        [
          f"{row['examples']:,}",
          *(f"{row[key] / 1e6:.1f}" for key in ("own", "workers")),
          f"{(total - first) / 1e6:+.1f}",
        ]
      )
    parts.append(f"memory with {number} workers\n{format_columns(rows)}")
  return "\n\n".join(parts)


def against_store(
  path: pathlib.Path,
  folder: str,
  local: data_load.Load,
  *,
  rows: int,
  rounds: int,
  threads: Sequence[int],
) -> dict[str, Any]:
  """Copies a file to a store, and measures batches of both.

  The ratio is that of CPU time, which other programs disturb less.

  Args:
    path: file of `write_vqa_tsv`.
    folder: where it is copied, such as gs://BUCKET/FOLDER.
    local: the file, as a training run reads it.
    rows: examples of a turn.
    rounds: turns of each candidate.
    threads: numbers of threads to try, each with both files.

  Returns:
    The content of `--json`.
  """
  copy: Any = as_path(folder) / path.name
  copy.put(path)
  entry = local.entries[0]._replace(source=data_load.open_tsv(copy))
  loads = {LOCAL: local, STORE: dataclasses.replace(local, entries=[entry])}
  candidates = {
    f"{place}, {number} threads": (place, number)
    for number in threads
    for place in loads
  }
  # CPU and wall seconds.
  times = {name: np.zeros((2, rounds)) for name in candidates}
  for i, name, (place, number) in timing.turns(candidates, rounds):
    times[name][:, i] = _seconds(loads[place], rows, number)
  return {
    "benchmark": "data, store",
    "sizes": {
      "rows": rows,
      "image_size": "x".join(map(str, local.image_size)),
      "batch": local.batch_size,
    },
    "rounds": rounds,
    "environment": timing.environment(),
    "results": {
      name: {
        "cpu_ms": timing.spread(1e3 * times[name][0]),
        "wall_ms": timing.spread(1e3 * times[name][1]),
        "ratio": timing.spread(
          times[f"{LOCAL}, {number} threads"][0] / times[name][0]
        ),
      }
      for name, (_, number) in candidates.items()
    },
  }


def _seconds(
  load: data_load.Load, rows: int, threads: int
) -> tuple[float, float]:
  """Returns CPU and wall time of an example, in seconds."""
  batches = load.batches(0, threads=threads, prefetch=threads)
  try:
    # What is made ahead before the clock starts does not count.
    for _ in range(threads):
      next(batches)
    count = -(-rows // load.batch_size)
    cpu, wall = data_load.cpu_seconds(), time.perf_counter()
    for _ in range(count):
      next(batches)
    spent = data_load.cpu_seconds() - cpu, time.perf_counter() - wall
    examples = count * load.batch_size
    return spent[0] / examples, spent[1] / examples
  finally:
    batches.close()


def format_store(report: dict[str, Any]) -> str:
  """Returns the report as text."""
  rows = [["", "CPU ms, median (min..max)", "wall ms", "rate / local"]]
  rows += [
    [
      name,
      timing.format_spread(result["cpu_ms"], 2),
      timing.format_spread(result["wall_ms"], 2),
      timing.format_spread(result["ratio"], 2),
    ]
    for name, result in report["results"].items()
  ]
  facts = timing.format_facts("data, store", report)
  return "\n".join([*facts, "", format_columns(rows)])
