"""Times saving and restoring, and what saving costs the step loop.

  python -m narvl_jax.benchmarks.checkpoints --config=configs/shapes.py
      [--json=PATH]

Updates run in windows of `--steps` on one batch. Windows that begin with a save
alternate with windows that do not.

blocked: share of the time in which the loop waits for `Checkpoints.save`.
whole cost: how much longer the window took than the other one of its round,
  with the work in the background. Its CPU time is disturbed less by other
  programs, but means little if the model runs on an accelerator.
committed: time from a save until it is on disk.
restored: time of a restore with its checks in a fresh process, from files that
  the system may have cached. The first restore compiles. Its peak is the rise
  of resident memory, with the compiler's and, on a CPU, the state (Linux only).

Results are in docs/performance.md.
"""

import collections
import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from narvl_jax.benchmarks import timing
from narvl_jax.checkpointing.writing import FOLDER, Checkpoints, restore_target
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import Config, from_json, to_json
from narvl_jax.experiment.create import create
from narvl_jax.parallel import mesh_from_config, shard_batch
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.setup import Setup, build_setup

# As in the loop: one update runs, one is queued.
_MAX_AHEAD = 2


class _Run:
  """A training loop on one batch."""

  def __init__(self, setup: Setup, checkpoints: Checkpoints) -> None:
    self._setup = setup
    self._checkpoints = checkpoints
    self._update = functools.partial(setup.compile_step(), setup.read_inputs())
    self._batch = shard_batch(_batch(setup), setup.mesh)
    self._state: TrainState = setup.init(jax.random.key(0))
    checkpoints.prepare(self._state)
    self._saved = 0
    self.window(1)

  def save(self) -> float:
    """Saves the state; returns the seconds that the loop waits."""
    jax.block_until_ready(self._state)
    self._saved += 1
    start = time.perf_counter()
    self._checkpoints.save(self._saved, self._state)
    return time.perf_counter() - start

  def save_at_rest(self) -> float:
    """Saves; returns the seconds until the checkpoint is on disk."""
    start = time.perf_counter()
    self.save()
    self._checkpoints.wait()
    return time.perf_counter() - start

  def window(self, steps: int, *, saves: bool = False) -> dict[str, float]:
    """Runs updates, after a save if `saves`.

    Returns:
      The seconds "all" and "cpu", with a save also "blocked" and "committed".
    """
    times = {}
    start, cpu_start = time.perf_counter(), time.process_time()
    if saves:
      times["blocked"] = self.save()
    running: collections.deque[Any] = collections.deque()
    for _ in range(steps):
      self._state, metrics = self._update(self._state, self._batch)
      running.append(metrics)
      if len(running) > _MAX_AHEAD:
        jax.block_until_ready(running.popleft())
      if saves and "committed" not in times and self._on_disk():
        times["committed"] = time.perf_counter() - start
    jax.block_until_ready(self._state)
    times["all"] = time.perf_counter() - start
    if saves and "committed" not in times:
      self._checkpoints.wait()
      times["committed"] = time.perf_counter() - start
    times["cpu"] = time.process_time() - cpu_start
    return times

  def _on_disk(self) -> bool:
    return self._checkpoints.progress.startswith("saved")


def benchmark(
  config: Config, folder: pathlib.Path, *, steps: int, rounds: int
) -> dict[str, Any]:
  """Measures a config.

  Args:
    config: of a run; its data are not read.
    folder: empty folder for the checkpoints.
    steps: updates of a window.
    rounds: number of measurements.

  Returns:
    The content of `--json`: seconds, bytes, and shares of the loop's time.
  """
  setup = _setup(config)
  with jax.set_mesh(setup.mesh), Checkpoints(folder, keep_last=2) as store:
    run = _Run(setup, store)
    first = run.save()
    store.wait()
    windows = []
    for i in range(rounds):
      turn = (False, True) if i % 2 else (True, False)
      windows.append({saves: run.window(steps, saves=saves) for saves in turn})
    rest = [run.save_at_rest() for _ in range(rounds)]
    size = sum(
      file.stat().st_size
      for file in (folder / FOLDER / str(store.last_step)).rglob("*")
      if file.is_file()
    )
  plain = {
    name: np.array([window[False][name] for window in windows])
    for name in ("all", "cpu")
  }
  saving = {
    name: np.array([window[True][name] for window in windows])
    for name in windows[0][True]
  }
  restored = [_in_fresh_process(config, folder) for _ in range(rounds)]
  peaks = [peak for _, _, peak in restored if peak is not None]
  leaves = jax.tree.leaves(setup.abstract_state)
  seconds = {
    "one update": plain["all"] / steps,
    "blocked by a save": saving["blocked"],
    "committed, in the loop": saving["committed"],
    "committed, at rest": np.array(rest),
    "restored, first": np.array([first for first, _, _ in restored]),
    "restored, second": np.array([second for _, second, _ in restored]),
  }
  return {
    "benchmark": "checkpoints",
    "sizes": {"steps": steps, "parameters": setup.num_parameters},
    "rounds": rounds,
    "environment": timing.environment(),
    "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    "checkpoint_bytes": size,
    "first_save_seconds": first,
    "seconds": {name: timing.spread(x) for name, x in seconds.items()},
    "share": {
      "blocked": timing.spread(saving["blocked"] / plain["all"]),
      "whole cost": timing.spread(saving["all"] / plain["all"] - 1),
      "whole cost, CPU time": timing.spread(saving["cpu"] / plain["cpu"] - 1),
    },
    "restore_peak_bytes": timing.spread(np.array(peaks)) if peaks else None,
  }


def _setup(config: Config) -> Setup:
  experiment = create(config, shapes_only=True)
  return build_setup(experiment, mesh_from_config(config.mesh))


def _batch(setup: Setup) -> dict[str, np.ndarray]:
  """Returns random rows; the time of an update does not depend on them."""
  rng = np.random.default_rng(0)
  blank = setup.experiment.vocabulary.blank_id
  task = TASKS.index(next(iter(setup.experiment.config.tasks)))

  def draw(name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
    if name == "image":
      return rng.integers(0, 256, like.shape, dtype=like.dtype)
    if name in ("text", "labels"):
      return rng.integers(4, blank, like.shape, dtype=like.dtype)
    if name == "label_length":
      longest = setup.batch["labels"].shape[1]
      # Half of them, because repeated labels need more queries.
      return np.full(like.shape, (longest + 1) // 2, like.dtype)
    return np.full(like.shape, task if name == "task" else 1, like.dtype)

  return {name: draw(name, like) for name, like in setup.batch.items()}


def _in_fresh_process(
  config: Config, folder: pathlib.Path
) -> tuple[float, float, int | None]:
  """Returns the seconds of two restores, and the peak of the first."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(_time_restores, to_json(config), folder).result()


def _time_restores(
  config: dict[str, Any], folder: pathlib.Path
) -> tuple[float, float, int | None]:
  """Times two restores; called in the fresh process."""
  setup = _setup(from_json(config))
  target = restore_target(setup.abstract_state, setup.shardings)
  with jax.set_mesh(setup.mesh), Checkpoints(folder) as checkpoints:
    step = checkpoints.last_step
    assert step is not None

    def restore() -> float:
      start = time.perf_counter()
      jax.block_until_ready(checkpoints.restore(step, target))
      return time.perf_counter() - start

    peak, first = timing.peak_memory(restore)
    return first, restore(), peak


def format_report(report: dict[str, Any]) -> str:
  """Returns the report as text."""
  shares = {
    name: {key: 100 * value for key, value in spread.items()}
    for name, spread in report["share"].items()
  }
  megabytes = timing.format_megabytes
  peak = report["restore_peak_bytes"]
  return "\n".join(
    [
      *timing.format_facts("checkpoints", report),
      f"state {megabytes(report['state_bytes'])} MB, checkpoint"
      f" {megabytes(report['checkpoint_bytes'])} MB, first save"
      f" {report['first_save_seconds']:.3f} s, restore rises by"
      f" {megabytes(peak and peak['median'])} MB",
      "",
      timing.format_spreads("", "seconds", report["seconds"], 3),
      "",
      timing.format_spreads(
        f"of {report['sizes']['steps']} updates", "%", shares, 2
      ),
    ]
  )


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_config_flag()
  flags.DEFINE_integer("steps", 100, "Updates for each save.", lower_bound=1)
  flags.DEFINE_integer("rounds", 5, "Rounds of measurement.", lower_bound=1)
  flags.DEFINE_string(
    "folder", None, "For the checkpoints; default: a temporary one."
  )
  common_flags.json()
  flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  check_json_path(settings.json)
  if settings.folder and not os.path.isdir(settings.folder):
    raise UserError(f'no folder "{settings.folder}" (--folder=PATH)')
  with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
    report = benchmark(
      settings.config,
      pathlib.Path(folder),
      steps=settings.steps,
      rounds=settings.rounds,
    )
  print(format_report(report), flush=True)
  write_report(settings.json, report)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
