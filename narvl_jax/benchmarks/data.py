"""Times how training data are read, stage by stage, against bare Pillow.

  python -m narvl_jax.benchmarks.data [--config=FILE] [--json=PATH]

Without a config it reads an OFA TSV file of 640 x 480 JPEG pictures that it
writes first. "bare Pillow" opens, converts and resizes the same pictures from
memory and does nothing else; the candidates take turns with it. A stage is
timed alone, on what the stage before it gave; decode and resize each hold a
copy between Pillow and NumPy. "end to end" is `pipeline.train_batches`, random
order included, with so many worker processes; 0 works on demand, in one
thread.

The rate per core is that of CPU time, of all processes; other programs that
hold the cores do not touch it. `ratio` is that rate over the one of the bare
loop in the same round.

  --first_batch  a fresh process: seconds until the first batch, index cached;
                 speed of building the index of rows, against reading alone
  --memory       resident memory over 20,000 examples (--max_examples)
"""

import copy
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

from narvl_jax.benchmarks import data_load, data_startup, timing
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_json
from narvl_jax.data.batches.batching import Batcher
from narvl_jax.data.pictures import images
from narvl_jax.data.pictures.files import FORMATS
from narvl_jax.data.sources.ofa_tsv import OfaTsvSource, decode_base64
from narvl_jax.data.tasks import make_task

BARE = "bare Pillow"
_PREFETCH = 2


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """Work on `images` pictures; `finish` waits for what works ahead."""

  run: Callable[[], int]
  finish: Callable[[], None] = lambda: None


def benchmark(
  load: data_load.Load, *, rows: int, rounds: int, workers: Sequence[int]
) -> dict[str, Any]:
  """Measures all stages and the whole.

  Args:
    load: what is read.
    rows: records of a turn.
    rounds: how often each candidate has its turn.
    workers: numbers of processes to try.

  Returns:
    What `--json` writes.

  Raises:
    UserError: too many records are bad.
  """
  sample = load.sample(rows)
  candidates = {BARE: _Candidate(_bare(load, sample)), **_stages(load, sample)}
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
  """Returns seconds of CPU and of wall per picture, for every round."""
  cpu = {name: np.zeros(rounds) for name in candidates}
  wall = {name: np.zeros(rounds) for name in candidates}
  for candidate in candidates.values():  # Imports, page cache, first buffers.
    candidate.run()
    candidate.finish()
  for i in range(rounds):
    for name, candidate in list(candidates.items())[:: -1 if i % 2 else 1]:
      # Work ahead is paid for in the turn that caused it.
      cpu_start, start = data_load.cpu_seconds(), time.perf_counter()
      count = candidate.run()
      wall[name][i] = (time.perf_counter() - start) / count
      candidate.finish()
      spent = data_load.cpu_seconds() - cpu_start
      cpu[name][i] = max(spent, 1e-9) / count
  return {name: (cpu[name], wall[name]) for name in candidates}


def _take(batches: Any, rows: int, batch_size: int, ahead: int) -> int:
  """Takes batches, many more than were ready before."""
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


def _stages(
  load: data_load.Load, sample: Sequence[Any]
) -> dict[str, _Candidate]:
  """Returns the stages, each on what the stage before it gives."""
  stages: dict[str, Callable[[Any], Any]] = {}
  inputs: dict[str, list[Any]] = {}

  def add(name: str, function: Callable[[Any], Any], items: list[Any]) -> None:
    stages[name], inputs[name] = function, items

  places = [(source, index) for source, index, _ in sample]
  if all(isinstance(source, OfaTsvSource) for source, _ in places):
    add("read", lambda place: place[0].rows[place[1]], places)
    fields = [
      source.rows[index].split(b"\t")[source.columns[1]]
      for source, index in places
    ]
    add("base64", decode_base64, fields)
  add("record (all of the above)", lambda place: place[0][place[1]], places)
  records = [record for _, _, record in sample]
  pictures = [record.image for record in records]
  sizes = [_height_and_width(picture) for picture in pictures]
  add(
    "decode",
    lambda item: images.prepare_image(*item),
    list(zip(pictures, sizes, strict=True)),
  )
  decoded = [
    images.prepare_image(picture, size)
    for picture, size in zip(pictures[:64], sizes, strict=False)
  ]
  add("resize", lambda x: images.prepare_image(x, load.image_size), decoded)
  candidates = {
    name: _Candidate(functools.partial(_each, stages[name], inputs[name]))
    for name in stages
  }
  candidates["tokenise"] = _Candidate(lambda: _tokenise(load, records))
  candidates["batch"] = _Candidate(_batch(load, records))
  return candidates


def _height_and_width(picture: Any) -> tuple[int, int]:
  width, height = images.original_size(picture)
  return height, width


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> int:
  for item in items:
    function(item)
  return len(items)


def _tokenise(load: data_load.Load, records: Sequence[Any]) -> int:
  """Encodes every record with nothing remembered."""
  tasks = {
    # A copy has an empty cache.
    name: make_task(
      name, copy.copy(task.vocabulary), dataclasses.asdict(task.settings)
    )
    for name, task in load.tasks.items()
  }
  for record in records:
    tasks[record.task].encode(record)
  return len(records)


def _batch(load: data_load.Load, records: Sequence[Any]) -> Callable[[], int]:
  """Fills batches with pictures that are ready and texts that are known."""
  ready = [
    dataclasses.replace(
      record, image=images.prepare_image(record.image, load.image_size)
    )
    for record in records[: load.batch_size]
  ]
  batcher = Batcher(
    load.image_size, load.max_text_length, load.max_label_length
  )

  def run() -> int:
    batch = batcher.empty(len(ready))
    for row, record in enumerate(ready):
      batcher.write(
        batch, row, record, load.tasks[record.task], target="optional"
      )
    return len(ready)

  return run


def format_report(report: dict[str, Any]) -> str:
  """Returns the report as a table for people."""
  rows = [["", "CPU ms, median (min..max)", "wall ms", "pictures/s/core"]]
  rows[0].append(f"rate / {BARE}")
  for name, result in report["results"].items():
    rows.append(
      [
        name,
        timing.format_spread(result["cpu_ms"], 3),
        f"{result['wall_ms']['median']:.3f}",
        f"{result['per_core']['median']:.0f}",
        timing.format_spread(result["ratio"], 2),
      ]
    )
  facts = {**report["sizes"], "rounds": report["rounds"]}
  return "\n".join(
    [
      "data: " + " ".join(f"{k}={v}" for k, v in facts.items()),
      " ".join(f"{k}={v}" for k, v in report["environment"].items()),
      "",
      timing.format_table(rows),
    ]
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
  flags.DEFINE_string("folder", None, "Keeps generated files, for later.")
  flags.DEFINE_boolean("first_batch", False, "Time until the first batch.")
  flags.DEFINE_boolean("memory", False, "Resident memory.")
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
    if settings.first_batch:
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
  write_json(settings.json, report)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
