"""Measures quality and latency of every decoding."""

import contextlib
import datetime
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import numpy as np

from narvl_jax.ahead_of_time.topology import Topology, get_topology
from narvl_jax.benchmarks import timing, workloads
from narvl_jax.comparison import (
  compiled,
  latency,
  quality,
  random_weights,
  report,
  runs,
)
from narvl_jax.comparison.case import Case, choose_lengths, length_programs
from narvl_jax.comparison.options import Options
from narvl_jax.comparison.plot import check_can_draw, draw_lengths
from narvl_jax.comparison.ways import NAR
from narvl_jax.files.disk import write_json
from narvl_jax.files.stores import as_path
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import format_count, show

JSON_FILE, PLOT_FILE = "comparison.json", "latency.png"


def compare(options: Options) -> dict[str, Any]:
  """Measures, prints tables, writes and returns `comparison.json`.

  Raises:
    UserError: the runs cannot be compared, or lack something that the options
      name.
  """
  if options.draws:
    check_can_draw()
  comparison = _Comparison(options)
  comparison.measure()
  show(report.format_report(comparison.result))
  for path in comparison.write():
    show(f"wrote {path}")
  return comparison.result


class _Comparison:
  """A comparison and its results so far.

  Attributes:
    result: the content of `comparison.json`.
  """

  def __init__(self, options: Options) -> None:
    self._options = options
    self._topology: Topology | None = None
    if options.topology:
      # The cache could not load a program of an absent device.
      jax.config.update("jax_enable_compilation_cache", False)
      self._topology = get_topology(options.topology)
    self._runs: dict[str, runs.Run] = {}
    if not options.size:
      self._runs = runs.open_runs(
        options.nar, options.ar, options.checkpoint, options.answers
      )
    self._cases = self._prepare_cases()
    self._start = time.monotonic()
    self.result = self._header()

  def measure(self) -> None:
    """Measures the tasks, one after the other."""
    for task, make_case in self._cases.items():
      with self._stage(task, "models and pictures"):
        case = make_case()
      entry = _entry(case)
      self.result["tasks"][task] = entry
      self.result["dtype"] = entry["facts"]["dtype"]
      if self._topology is not None:
        self._add_estimates(entry, case, self._topology)
        self.write()
        continue
      lengths = []
      if self._options.measure_latency and "lengths" not in self.result:
        # Raises for a length that does not fit, before the measurements.
        lengths = choose_lengths(case, self._options.lengths)
      if self._options.scores_answers:
        self._add_quality(entry, case)
      if self._options.measure_latency:
        self._add_latency(entry, case)
        # A later failure does not lose these measurements.
        self.write()
      if lengths:
        self._add_curves(case, lengths)

  def write(self) -> list[pathlib.Path]:
    """Writes the results so far and returns the files."""
    if self._options.to is None:
      return []
    folder = as_path(self._options.to)
    files = [folder / JSON_FILE]
    write_json(files[0], self.result)
    if "lengths" in self.result:
      files.append(folder / PLOT_FILE)
      draw_lengths(files[1], self.result["lengths"])
    return files

  @contextlib.contextmanager
  def _stage(self, task: str, what: str) -> Iterator[None]:
    """Shows the current stage: compiling and searching take minutes."""
    seconds = time.monotonic() - self._start
    show(f"[{seconds:7.1f}s] {task}: {what}")
    with progress.doing(f"{task}: {what}"):
      yield

  def _prepare_cases(self) -> dict[str, Callable[[], Case]]:
    """Returns task -> maker of its case; making one at a time saves memory."""
    chosen = self._options
    settings: dict[str, Any] = {
      "beam_size": chosen.beam_size,
      "wanted": chosen.ways,
      "uncached": chosen.uncached,
    }
    if not chosen.size:
      return {
        task: lambda t=task: runs.make_case(
          self._runs, t, chosen.split, **settings
        )
        for task in runs.common_tasks(self._runs, chosen.tasks)
      }
    of_topology: dict[str, Any] = {}
    if self._topology is not None:
      of_topology = {"dtype": "bfloat16", "shapes_only": True}
    loads = workloads.choose(chosen.tasks, chosen.image_size)
    return {
      task: lambda t=task, w=load: random_weights.make_case(
        chosen.size, t, w, **of_topology, **settings
      )
      for task, load in loads.items()
    }

  def _header(self) -> dict[str, Any]:
    models = {kind: run.describe() for kind, run in self._runs.items()}
    random = {"both": {"size": self._options.size, "weights": "random"}}
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
      "models": models or random,
      "latency": self._options.measure_latency,
      "topology": self._options.topology or None,
      "batch_sizes": list(self._options.batch_sizes),
      "rounds": self._options.rounds,
      "tasks": {},
    }

  def _add_quality(self, entry: dict[str, Any], case: Case) -> None:
    scores = quality.measure(
      case,
      self._runs,
      self._options.split,
      self._options.max_examples or None,
      lambda what: self._stage(case.task, what),
    )
    for label, found in scores.items():
      entry["ways"][label]["quality"] = found

  def _add_latency(self, entry: dict[str, Any], case: Case) -> None:
    rounds = self._options.rounds
    counted = format_count(rounds, "round")
    for size in self._options.batch_sizes:
      with self._stage(case.task, f"times at batch {size}, {counted}"):
        times = latency.measure(
          case.encoders,
          case.programs,
          case.batches(size, rounds),
          rounds=rounds,
        )
      for label, measured in times.items():
        way = entry["ways"][label]
        way.setdefault("latency", {})[str(size)] = measured

  def _add_estimates(
    self, entry: dict[str, Any], case: Case, topology: Topology
  ) -> None:
    for size in self._options.batch_sizes:
      with self._stage(case.task, f"compiles at batch {size}"):
        found = compiled.estimate(case, size, topology)
      for label, estimate in found.items():
        way = entry["ways"][label]
        way.setdefault("estimates", {})[str(size)] = estimate

  def _add_curves(self, case: Case, lengths: list[int]) -> None:
    with self._stage(case.task, "times by length of the answer"):
      curves = latency.length_curves(
        case.encoders,
        length_programs(case, lengths, self._options.beam_size),
        case.batches(1, 1)[0],
        rounds=self._options.rounds,
      )
    self.result["lengths"] = {
      "task": case.task,
      "batch": 1,
      "queries": case.facts["queries"],
      "curves": curves,
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
