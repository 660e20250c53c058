r"""Compares the parallel model with its autoregressive counterpart.

    python -m narvl_jax.compare --nar=runs/nar --ar=runs/ar
    python -m narvl_jax.compare --nar=runs/nar --ar=runs/ar \
      --tasks=caption,vqa --batch_size=1,8 --rounds=20 --to=comparison
    python -m narvl_jax.compare --size=base --uncached --batch_size=1

Prints tables of quality and latency of every way to decode, and writes
comparison.json and latency.png into --to. With --size, latency alone, of
random weights at the resolutions of the official models.
docs/performance.md describes what is measured.
"""

import contextlib
import datetime
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax
import jax
import numpy as np
from absl import flags

from narvl_jax.benchmarks import timing
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.comparison import latency, random_weights, report, runs
from narvl_jax.comparison.case import (
  LENGTHS,
  Case,
  choose_lengths,
  length_programs,
)
from narvl_jax.comparison.plot import check_can_draw, draw_lengths
from narvl_jax.comparison.ways import NAR, UNCACHED
from narvl_jax.errors import UserError, check_counts, check_lists
from narvl_jax.files.disk import write_json
from narvl_jax.files.paths import check_folder
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import show

JSON_FILE, PLOT_FILE = "comparison.json", "latency.png"


def compare(
  nar: str = "",
  ar: str = "",
  *,
  size: str = "",
  tasks: Sequence[str] = (),
  split: str = "test",
  max_examples: int | None = None,
  checkpoint: str | int = "best",
  image_size: int | None = None,
  batch_sizes: Sequence[int] = (1, 8),
  rounds: int = 10,
  lengths: Sequence[int] | None = None,
  beam_size: int = 5,
  ways: Sequence[str] = (),
  answers: str = "",
  uncached: bool = False,
  measure_quality: bool = True,
  measure_latency: bool = True,
  to: str | None = None,
) -> dict[str, Any]:
  """Measures, prints tables and writes the results.

  Args:
    nar: run folder of a parallel model.
    ar: run folder of an autoregressive one.
    size: a named size with random weights instead of the runs.
    tasks: all that the runs share by default.
    split: of the data sets.
    max_examples: at most this many of every data set; all if None or 0.
    checkpoint: "best", "last" or a step.
    image_size: pixels a side, for `size`; those of the task if None.
    batch_sizes: for latency.
    rounds: how often each program is timed.
    lengths: tokens of an answer at which decoders are timed; may be empty;
      None: 1 to 20, as far as the models have positions.
    beam_size: of both models.
    ways: labels such as "AR beam"; all by default.
    answers: file of the answers that VQA allows; those of the runs' configs if
      "".
    uncached: also time greedy search without a cache.
    measure_quality: on the split; not for `size`.
    measure_latency: of encoders and decoders.
    to: folder for the results; None: they are only printed.

  Returns:
    The content of `comparison.json`.

  Raises:
    UserError: an argument is wrong, or the runs do not belong together.
  """
  _check(nar, ar, size, image_size, measure_quality, measure_latency)
  check_lists(tasks=tasks, ways=ways, lengths=lengths, batch_sizes=batch_sizes)
  _check_files(size, answers, to)
  check_counts(least=0, max_examples=max_examples)
  check_counts(rounds=rounds, beam_size=beam_size)
  check_counts(batch_size=min(batch_sizes, default=None))
  check_counts(lengths=min(lengths or (), default=None))
  if to and measure_latency and (lengths is None or lengths):
    check_can_draw()
  opened = {} if size else runs.open_runs(nar, ar, checkpoint, answers)
  cases = _cases(
    opened,
    size,
    tasks,
    split,
    image_size,
    beam_size=beam_size,
    wanted=ways,
    uncached=uncached,
  )
  measure_quality = measure_quality and not size
  start = time.monotonic()
  result = _header(opened, size, batch_sizes, rounds, measure_latency)
  for task, make in cases.items():
    stage = functools.partial(_stage, start, task)
    with stage("models and pictures"):
      case = make()
    entry = _entry(case)
    result["tasks"][task] = entry
    result["dtype"] = entry["facts"]["dtype"]
    curve = []
    if measure_latency and "lengths" not in result:
      # A length that does not fit is told before anything is measured.
      curve = choose_lengths(case, lengths)
    if measure_quality:
      _add_quality(entry, case, opened, split, max_examples or None, stage)
    if measure_latency:
      _add_latency(entry, case, batch_sizes, rounds, stage)
      # What has been measured outlives a later failure.
      _write(to, result)
      if curve:
        with stage("times by length of the answer"):
          result["lengths"] = _curves(case, curve, beam_size, rounds)
  show(report.format_report(result))
  for path in _write(to, result):
    show(f"wrote {path}")
  return result


@contextlib.contextmanager
def _stage(start: float, task: str, what: str) -> Iterator[None]:
  """Shows what is under way: compiling and searching take minutes."""
  seconds = time.monotonic() - start
  show(f"[{seconds:7.1f}s] {task}: {what}")
  with progress.doing(f"{task}: {what}"):
    yield


def _cases(
  opened: dict[str, runs.Run],
  size: str,
  tasks: Sequence[str],
  split: str,
  image_size: int | None,
  **options: Any,
) -> dict[str, Callable[[], Case]]:
  """Returns task -> what makes its case, one at a time for its memory."""
  if not size:
    return {
      task: lambda t=task: runs.make_case(opened, t, split, **options)
      for task in runs.common_tasks(opened, tasks)
    }
  loads = random_weights.workloads(tasks, image_size)
  return {
    task: lambda t=task, w=load: random_weights.make_case(size, t, w, **options)
    for task, load in loads.items()
  }


def _check(
  nar: str,
  ar: str,
  size: str,
  image_size: int | None,
  measure_quality: bool,
  measure_latency: bool,
) -> None:
  if size and (nar or ar):
    raise UserError(
      f"--size={size} has random weights and needs no runs; drop --size, or"
      " --nar and --ar"
    )
  if not size:
    for flag, value in (("nar", nar), ("ar", ar)):
      if not value:
        raise UserError(f"--{flag}=RUN is missing (or use --size=base)")
    if image_size is not None:
      raise UserError(
        f"--image_size={image_size} is for --size; runs have their own"
      )
  if not (measure_latency or (measure_quality and not size)):
    raise UserError(
      "nothing is left to measure; drop --no_latency"
      + ("" if size else " or --no_quality")
    )


def _check_files(size: str, answers: str, to: str | None) -> None:
  if size and answers:
    raise UserError(
      f"--answers={answers} is for --nar and --ar; --size={size} has answers of"
      " its own"
    )
  if to is not None and os.path.isfile(to):
    raise UserError(f"--to={to} is a file; give a folder for the results")
  if to is not None:
    check_folder("--to", to)


def _header(
  opened: dict[str, runs.Run],
  size: str,
  batch_sizes: Sequence[int],
  rounds: int,
  measure_latency: bool,
) -> dict[str, Any]:
  models = {kind: run.describe() for kind, run in opened.items()}
  now = datetime.datetime.now(datetime.UTC)
  return {
    "date": now.isoformat(timespec="seconds"),
    "environment": {
      **timing.environment(),
      "devices": jax.device_count(),
      "flax": flax.__version__,
      "numpy": np.__version__,
    },
    "dtype": "",
    "models": models or {"both": {"size": size, "weights": "random"}},
    "latency": measure_latency,
    "batch_sizes": list(batch_sizes),
    "rounds": rounds,
    "tasks": {},
  }


def _entry(case: Case) -> dict[str, Any]:
  ways: dict[str, Any] = {}
  for way in case.ways:
    ways[way.label] = (
      {"not_applicable": way.reason}
      if way.decoding is None
      else {"decoding": dict(vars(way.decoding))}
    )
  model: Any = case.models[NAR].network.model
  dtype = np.dtype(model.config.dtype).name
  return {"facts": {**case.facts, "dtype": dtype}, "ways": ways}


def _add_quality(
  entry: dict[str, Any],
  case: Case,
  opened: dict[str, runs.Run],
  split: str,
  max_examples: int | None,
  stage: Callable[[str], AbstractContextManager[None]],
) -> None:
  for way in case.ways:
    # Without a cache the answers are the same.
    if way.decoding is not None and way.label != UNCACHED:
      with stage(f"answers of {way.label}"):
        entry["ways"][way.label]["quality"] = runs.quality(
          opened[way.model], case.task, way, split, max_examples
        )


def _add_latency(
  entry: dict[str, Any],
  case: Case,
  batch_sizes: Sequence[int],
  rounds: int,
  stage: Callable[[str], AbstractContextManager[None]],
) -> None:
  for size in batch_sizes:
    with stage(f"times at batch {size}, {rounds} rounds"):
      times = latency.measure(
        case.encoders, case.programs, case.batches(size, rounds), rounds=rounds
      )
    for label, measured in times.items():
      way = entry["ways"][label]
      way.setdefault("latency", {})[str(size)] = measured


def _curves(
  case: Case, lengths: Sequence[int], beam_size: int, rounds: int
) -> dict[str, Any]:
  return {
    "task": case.task,
    "batch": 1,
    "queries": case.facts["queries"],
    "curves": latency.length_curves(
      case.encoders,
      length_programs(case, lengths, beam_size),
      case.batches(1, 1)[0],
      rounds=rounds,
    ),
  }


def _write(to: str | None, result: dict[str, Any]) -> list[pathlib.Path]:
  """Writes what there is so far and returns the files."""
  if to is None:
    return []
  folder = pathlib.Path(to)
  files = [folder / JSON_FILE]
  write_json(files[0], result)
  if "lengths" in result:
    files.append(folder / PLOT_FILE)
    draw_lengths(files[1], result["lengths"])
  return files


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("nar", "", "Run folder of a parallel model.")
  flags.DEFINE_string("ar", "", "Run folder of an autoregressive model.")
  flags.DEFINE_string(
    "size", "", "Random weights of this size instead, for latency alone."
  )
  flags.DEFINE_list("tasks", [], "Tasks; default: all.")
  common_flags.split("Split of the data sets.", "test")
  common_flags.max_examples("At most this many of every data set; 0: all.", 0)
  common_flags.checkpoint()
  flags.DEFINE_integer("image_size", None, "Pixels a side, for --size.")
  flags.DEFINE_list(
    "batch_size", ["1", "8"], "Examples at a time, one number or several."
  )
  common_flags.rename("batch_sizes", "batch_size")
  flags.DEFINE_integer("rounds", 10, "How often each program is timed.")
  flags.DEFINE_list(
    "lengths",
    None,
    f"Tokens of an answer, for the plot; empty: no plot. Default:"
    f" {','.join(map(str, LENGTHS))}, as far as the models have positions.",
  )
  flags.DEFINE_integer("beam_size", 5, "Hypotheses of the beam searches.")
  flags.DEFINE_list("ways", [], "Such as ar-beam; default: all.")
  common_flags.answers("the runs'")
  flags.DEFINE_bool("uncached", False, "Time greedy search without a cache.")
  flags.DEFINE_bool("no_quality", False, "Do not score the answers.")
  flags.DEFINE_bool("no_latency", False, "Do not time anything.")
  common_flags.to("Folder for the results.")


def _numbers(flag: str) -> list[int]:
  values = getattr(flags.FLAGS, flag)
  for value in values:
    if not value.strip().isdecimal():
      raise UserError(
        f'--{flag}: "{value}" is no whole number; such as --{flag}=1,8'
      )
  return [int(value) for value in values]


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  compare(
    settings.nar,
    settings.ar,
    size=settings.size,
    tasks=settings.tasks,
    split=settings.split,
    max_examples=settings.max_examples,
    checkpoint=settings.checkpoint,
    image_size=settings.image_size,
    batch_sizes=_numbers("batch_size"),
    rounds=settings.rounds,
    lengths=None if settings.lengths is None else _numbers("lengths"),
    beam_size=settings.beam_size,
    ways=settings.ways,
    answers=settings.answers,
    uncached=settings.uncached,
    measure_quality=not settings.no_quality,
    measure_latency=not settings.no_latency,
    to=settings.to,
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main)
