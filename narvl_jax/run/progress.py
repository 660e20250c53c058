"""The progress line that a run prints every few steps."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from narvl_jax.experiment.experiment import relative_evaluation
from narvl_jax.hosts.host_times import Comparison
from narvl_jax.run.eta import Eta
from narvl_jax.run.run import Run
from narvl_jax.run_folder.goodput import STALL
from narvl_jax.terminal.activity import Activity, format_duration
from narvl_jax.terminal.progress import doing
from narvl_jax.terminal.text import show
from narvl_jax.training.flops import peak_flops

# Share of the time from which waiting for data is shown.
_NOTED_WAIT = 0.1


class Progress:
  """Averages metrics between two reports and measures the speed."""

  def __init__(
    self,
    run: Run,
    counters: Callable[[int], Mapping[str, float]],
    health: Callable[[], Mapping[str, int]],
  ) -> None:
    self._config = run.config.train
    self._run = run
    self._ledger = run.guard.ledger
    self._counters = counters
    self._health = health
    self._devices = run.setup.mesh.size
    self._eta = Eta(
      self._config.steps,
      eval_every=self._config.eval_every,
      checkpoint_every=self._config.checkpoint_every,
      final_evaluation=relative_evaluation(run.experiment),
    )
    self._saved = run.checkpoints.progress
    self._updates, self._dispatch_seconds = 0, 0.0
    self._bar = Activity("training", self._config.steps, "steps")
    peak = peak_flops(run.setup.mesh.devices.flat[0])
    # Counting traces the model, so it is done only where the peak is known.
    self._flops_share = (
      None if peak is None else run.setup.step_flops() / (peak * self._devices)
    )

  @contextlib.contextmanager
  def shown(self, step: int) -> Iterator[None]:
    """Shows a progress bar on a terminal, starting at `step`."""
    steps = self._config.steps
    with doing("training", steps, "steps", done=step, only_live=True) as bar:
      self._bar = bar
      yield

  def start(self, step: int) -> None:
    """Starts, or restarts, the reports with the update after `step`."""
    self._reported = self._step = step
    self._steps: list[Mapping[str, jax.Array]] = []
    self._last_seconds = self._ledger.seconds()
    self._last_elapsed = self._ledger.elapsed()

  @contextlib.contextmanager
  def dispatching(self) -> Iterator[None]:
    """Measures the time in which this host hands an update to its devices."""
    start = time.monotonic()
    yield
    self._updates += 1
    self._dispatch_seconds += time.monotonic() - start

  def add(
    self, step: int, position: int, metrics: Mapping[str, jax.Array]
  ) -> None:
    """Records a finished update and reports every `train.log_every` steps."""
    self._step = self._bar.done = step
    self._position = position
    self._steps.append(metrics)
    if step % self._config.log_every == 0:
      self.report()

  def report(self) -> None:
    """Writes and prints the means since the last report, if any."""
    if not self._steps:
      return
    values = mean_metrics(self._steps)
    count = len(self._steps)
    self._steps = []
    values |= {**self._speed(count), **self._health()}
    left = self._eta.seconds_left(self._step)
    if left is not None:
      values["seconds_left"] = left
    counters = self._counters(self._position + 1)
    slowest = self._compare_hosts()
    self._run.writer.write(
      self._step,
      {
        **{f"train/{name}": value for name, value in values.items()},
        **{f"data/{name}": value for name, value in counters.items()},
        **self._run.guard.goodput().metrics(),
        **{
          name: value
          for comparison in slowest
          for name, value in comparison.metrics().items()
        },
      },
    )
    self._report_saved()
    bad = sum(n for name, n in counters.items() if name.endswith("/bad"))
    show(self._line(values, int(bad)))
    for comparison in slowest:
      if comparison.noted:
        show(f"{self._stamp()} {comparison}")

  def _compare_hosts(self) -> list[Comparison]:
    """Returns how the hosts differ; empty if that is not known, or one host.

    Updates end together on all hosts, because devices wait for each other. So
    what makes the others wait is compared: the time before the dispatch.
    """
    times = self._run.guard.times
    if times is None:
      return []
    seconds = self._ledger.seconds()
    wait = seconds.get("data wait", 0.0)
    times.record(
      self._updates,
      seconds.get("step", 0.0) + wait,
      {"data wait": wait, "dispatch": self._dispatch_seconds},
    )
    return times.compare()

  def _speed(self, count: int) -> dict[str, float]:
    seconds, elapsed = self._ledger.seconds(), self._ledger.elapsed()
    spent = {
      name: seconds.get(name, 0.0) - self._last_seconds.get(name, 0.0)
      for name in ("step", STALL, "data wait", "evaluation", "checkpoint")
    }
    pauses = {name: spent.pop(name) for name in ("evaluation", "checkpoint")}
    passed = elapsed - self._last_elapsed - sum(pauses.values())
    self._eta.add(self._reported, self._step, training=passed, **pauses)
    self._reported = self._step
    self._last_seconds, self._last_elapsed = seconds, elapsed
    total = max(sum(spent.values()), 1e-9)
    rate = count * self._config.batch_size / total
    speed = {
      "examples_per_second": rate,
      "examples_per_second_per_device": rate / self._devices,
      "data_wait": spent["data wait"] / total,
    }
    if self._flops_share is not None:
      speed["mfu"] = self._flops_share * count / total
    return speed

  def _report_saved(self) -> None:
    """Prints once that the newest checkpoint is on disk."""
    saved = self._run.checkpoints.progress
    if saved != self._saved and saved.startswith("saved"):
      step = saved.removeprefix("saved ")
      show(f"{self._stamp()} checkpoint of step {step} saved")
      self._saved = saved

  def _stamp(self) -> str:
    return f"[{self._ledger.elapsed():7.1f}s]"

  def _line(self, values: Mapping[str, float], bad_records: int) -> str:
    """Returns the line of an interval; normal values are left out."""
    steps = self._config.steps
    rate, loss = values["examples_per_second"], values["loss"]
    rate_digits = 1 if rate < 100 else 0
    parts = [
      f"{self._stamp()} step {self._step:>{len(str(steps))}}/{steps}",
      f"loss {loss:#.4g}",
      f"lr {_short(values['learning_rate'])}",
      f"{rate:.{rate_digits}f} ex/s",
    ]
    if "mfu" in values:
      parts.append(f"MFU {100 * values['mfu']:.0f}%")
    left = values.get("seconds_left")
    at_most = self._eta.is_upper_bound(self._step)
    at_least = self._eta.is_lower_bound(self._step) and not at_most
    self._bar.expect(left, at_least=at_least)
    if left is not None and self._step < steps:
      sign = "<" if at_most else ">" * at_least
      parts.append(f"ETA {sign}{format_duration(left)}")
    if values["data_wait"] >= _NOTED_WAIT:
      parts.append(f"data wait {100 * values['data_wait']:.0f} %")
    if values["infeasible_fraction"]:
      parts.append(f"infeasible {100 * values['infeasible_fraction']:.1f} %")
    if bad_records:
      parts.append(f"bad records {bad_records}")
    parts += [
      f"{name.replace('_', ' ')} {count}"
      for name, count in self._health().items()
      if count
    ]
    return "  ".join(parts)


def mean_metrics(steps: Iterable[Mapping[str, jax.Array]]) -> dict[str, float]:
  """Averages the metrics of several steps.

  NaN values of `nll/TASK` (no example in the batch) and skipped updates do not
  count, unless all updates were skipped. `learning_rate` is that of the last
  step.
  """
  fetched: list[dict[str, Any]] = jax.device_get(list(steps))
  kept = [step for step in fetched if not step["skipped"]] or fetched
  means = {}
  for name in fetched[0]:
    values = np.array([step[name] for step in kept], np.float64)
    if name.startswith("nll/"):
      values = values[~np.isnan(values)]
      if not len(values):
        continue
    means[name] = float(values.mean())
  means["learning_rate"] = float(fetched[-1]["learning_rate"])
  del means["examples"], means["skipped"]
  return means


def _short(value: float) -> str:
  """Returns two digits of a number, such as `3.5e-3`."""
  if not value:
    return "0"
  digits, exponent = f"{value:.1e}".split("e")
  return f"{digits}e{int(exponent)}"
