"""Times how training data are read, against bare Pillow.

  python -m narvl_jax.benchmarks.data [--config=FILE] [--json=PATH]
  python -m narvl_jax.benchmarks.data --first_batch --rows=100000
  python -m narvl_jax.benchmarks.data --memory
  python -m narvl_jax.benchmarks.data --store=gs://BUCKET/FOLDER

Without a config it reads a generated OFA TSV file of 640 x 480 JPEG pictures.
"bare Pillow" only opens, converts and resizes the same pictures from memory.
"end to end" is `pipeline.train_batches` with so many worker processes, random
order included; 0 works on demand in one thread. All take turns.

Rates are per second of CPU time of all processes, which other programs disturb
less. `ratio` is the rate over that of the bare loop in the same round.
--first_batch times a fresh process until its first batch, and the index of
rows against reading alone. --memory measures resident memory over
--max_examples examples. --store copies the file to a store, and compares
batches from there with those of the local file, for several numbers of threads.
Results are in docs/performance.md.
"""

import dataclasses
import functools
import io
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from narvl_jax.benchmarks import (
  data_load,
  data_startup,
  timing,
)
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.data.pictures.files import FORMATS
from narvl_jax.terminal.tables import format_columns

BARE = "bare Pillow"
_PREFETCH = 2


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """Reads pictures and returns how many; `finish` waits for work ahead."""

  run: Callable[[], int]
  finish: Callable[[], None] = lambda: None


def benchmark(
  load: data_load.Load, *, rows: int, rounds: int, workers: Sequence[int]
) -> dict[str, Any]:
  """Measures the bare loop and the whole pipeline.

  Args:
    load: what is read.
    rows: records of a turn.
    rounds: turns of each candidate.
    workers: numbers of processes to try.

  Returns:
    The content of `--json`.

  Raises:
    UserError: too many records are bad.
  """
  sample = load.sample(rows)
  candidates = {BARE: _Candidate(_bare(load, sample))}
  opened = []
  for number in workers:
    threads = load.num_threads if number else 0
    batches = load.batches(
      number, threads=threads, prefetch=_PREFETCH if number else 0
    )
    opened.append(batches)
    ahead = number * _PREFETCH + (2 * _PREFETCH if number else 0)
    candidates[f"end to end, {number} workers"] = _Candidate(
      functools.partial(_take, batches, rows, load.batch_size, ahead),
      data_load.wait_until_idle if number else lambda: None,
    )
  try:
    measured = _measure(candidates, rounds)
  finally:
    for batches in opened:
      batches.close()
  bare = measured[BARE]
  return {
    "benchmark": "data",
    "sizes": {
      "rows": len(sample),
      "image_size": "x".join(map(str, load.image_size)),
      "batch": load.batch_size,
      "picture_kb": round(_median_bytes(sample) / 1e3),
    },
    "rounds": rounds,
    "environment": timing.environment(),
    "results": {
      name: {
        "cpu_ms": timing.spread(1e3 * cpu),
        "wall_ms": timing.spread(1e3 * wall),
        "per_core": timing.spread(1 / cpu),
        "ratio": timing.spread(bare[0] / cpu),
      }
      for name, (cpu, wall) in measured.items()
    },
  }


def _measure(
  candidates: dict[str, _Candidate], rounds: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns CPU and wall seconds per picture, both float [rounds]."""
  cpu = {name: np.zeros(rounds) for name in candidates}
  wall = {name: np.zeros(rounds) for name in candidates}
  for candidate in candidates.values():  # Imports, page cache, first buffers.
    candidate.run()
    candidate.finish()
  for i, name, candidate in timing.turns(candidates, rounds):
    # Work ahead counts in the turn that caused it.
    cpu_start, start = data_load.cpu_seconds(), time.perf_counter()
    count = candidate.run()
    wall[name][i] = (time.perf_counter() - start) / count
    candidate.finish()
    spent = data_load.cpu_seconds() - cpu_start
    cpu[name][i] = max(spent, 1e-9) / count
  return {name: (cpu[name], wall[name]) for name in candidates}


def _take(batches: Any, rows: int, batch_size: int, ahead: int) -> int:
  """Reads many more batches than were ready before; returns examples."""
  count = max(1, -(-rows // batch_size), 4 * ahead)
  for _ in range(count):
    next(batches)
  return count * batch_size


def _median_bytes(sample: Sequence[Any]) -> float:
  sizes = [
    len(x.image) if isinstance(x.image, bytes) else x.image.nbytes
    for _, _, x in sample
  ]
  return float(np.median(sizes))


def _bare(load: data_load.Load, sample: Sequence[Any]) -> Callable[[], int]:
  height, width = load.image_size
  pictures = [record.image for _, _, record in sample]

  def run() -> int:
    for data in pictures:
      picture = (
        Image.open(io.BytesIO(data), formats=FORMATS)
        if isinstance(data, bytes)
        else Image.fromarray(data)
      )
      resized = picture.convert("RGB").resize(
        (width, height), Image.Resampling.BICUBIC
      )
      np.asarray(resized)
    return len(pictures)

  return run


def format_report(report: dict[str, Any]) -> str:
  """Returns the report as text."""
  rows = [
    [
      *("", "CPU ms, median (min..max)", "wall ms", "pictures/s/core"),
      f"rate / {BARE}",
    ]
  ]
  rows += [
    [
      name,
      timing.format_spread(result["cpu_ms"], 3),
      f"{result['wall_ms']['median']:.3f}",
      f"{result['per_core']['median']:.0f}",
      timing.format_spread(result["ratio"], 2),
    ]
    for name, result in report["results"].items()
  ]
  return "\n".join(
    [*timing.format_facts("data", report), "", format_columns(rows)]
  )


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_config_flag()
  flags.DEFINE_integer("rows", 256, "Records of a turn.", lower_bound=1)
  flags.DEFINE_integer("rounds", 5, "Rounds of measurement.", lower_bound=1)
  flags.DEFINE_list("num_workers", ["0", "1", "2"], "Numbers of processes.")
  common_flags.rename("workers", "num_workers")
  common_flags.batch_size("Examples at a time.", 32, old="batch", lower_bound=1)
  flags.DEFINE_integer("width", 640, "Of generated pictures.", lower_bound=8)
  flags.DEFINE_integer("height", 480, "Of generated pictures.", lower_bound=8)
  flags.DEFINE_integer("image_size", 480, "Pixels a side.", lower_bound=1)
  flags.DEFINE_string("folder", None, "Keeps generated files.")
  flags.DEFINE_string("store", None, "Compare with a copy in this folder.")
  flags.DEFINE_multi_integer(
    "num_threads", [8, 32], "Of --store.", lower_bound=1
  )
  flags.DEFINE_boolean("first_batch", False, "Time the first batch.")
  flags.DEFINE_boolean("memory", False, "Measure resident memory.")
  common_flags.max_examples(
    "Read by --memory.", 20_000, old="examples", lower_bound=1
  )
  common_flags.json()


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  check_json_path(settings.json)
  try:
    workers = [int(number) for number in settings.num_workers]
  except ValueError:
    cli.fail(
      f"--num_workers={settings.num_workers} must be numbers, such as 0,2"
    )
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(settings.folder or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    path = None
    if settings.config is None:
      path = data_load.make_tsv(
        folder, settings.rows, settings.width, settings.height
      )
      load = data_load.tsv_load(
        path,
        image_size=(settings.image_size, settings.image_size),
        batch_size=settings.batch_size,
      )
    else:
      load = data_load.config_load(settings.config)
    if settings.store:
      if path is None:
        cli.fail("--store is for the generated file; leave --config out")
      report = data_startup.against_store(
        path,
        settings.store,
        load,
        rows=settings.rows,
        rounds=settings.rounds,
        threads=settings.num_threads,
      )
      text = data_startup.format_store(report)
    elif settings.first_batch:
      report = data_startup.first_batch(load, path, rounds=settings.rounds)
      text = data_startup.format_first_batch(report)
    elif settings.memory:
      report = data_startup.memory(
        load, workers, examples=settings.max_examples
      )
      text = data_startup.format_memory(report)
    else:
      report = benchmark(
        load, rows=settings.rows, rounds=settings.rounds, workers=workers
      )
      text = format_report(report)
  print(text, flush=True)
  write_report(settings.json, report)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
