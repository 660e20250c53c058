"""The training loop, the same for every task."""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from narvl_jax.errors import UserError
from narvl_jax.training.checkpoints import Checkpoints
from narvl_jax.training.flops import peak_flops
from narvl_jax.training.interrupt import StopRequest
from narvl_jax.training.ledger import Ledger
from narvl_jax.training.metrics import (
  MetricsWriter,
  SilentMetrics,
  format_duration,
  mean_metrics,
)
from narvl_jax.training.prefetch import DevicePrefetcher
from narvl_jax.training.setup import Setup
from narvl_jax.training.train_state import TrainState

# Updates that wait on the devices: one runs, one is queued.
_MAX_AHEAD = 2

Metrics = dict[str, jax.Array]
# State and step -> metrics to write, and the score of the state, if any.
Evaluate = Callable[[TrainState, int], tuple[dict[str, float], float | None]]


@dataclasses.dataclass
class Loop:
  """What the loop works with.

  Attributes:
    setup: of the run.
    step: the compiled update.
    batches: on the devices, starting at the step of the state.
    counters: step -> what the run has used of each source; see
      `narvl_jax.data.pipeline.TrainBatches`.
    writer: of the metrics.
    checkpoints: of the run.
    evaluate: called every `train.eval_every` steps and after the last.
    ledger: of the run's time.
    stop: asks to end early.
  """

  setup: Setup
  step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
  batches: DevicePrefetcher
  counters: Callable[[int], dict[str, float]]
  writer: MetricsWriter | SilentMetrics
  checkpoints: Checkpoints
  evaluate: Evaluate
  ledger: Ledger
  stop: StopRequest

  def run(self, state: TrainState) -> TrainState:
    """Trains from the step of `state` to the last, or until told to stop.

    A checkpoint is saved at the step where it ends.

    Raises:
      UserError: the loss or the gradient is no longer finite. Such a state
        is never saved.
    """
    config = self.setup.experiment.config.train
    first = int(state.step)
    progress = _Progress(
      self.setup, self.ledger, self.checkpoints, self.counters, first
    )
    running: collections.deque[Metrics] = collections.deque()
    self.stop.begin()
    for step in range(first + 1, config.steps + 1):
      batch = self._next_batch(running)
      with self.ledger.stage("step"):
        state, metrics = self.step(state, batch)
        running.append(metrics)
        # Written one step late: what is fetched is then already computed.
        progress.report(self.writer)
        progress.add(step, metrics)
        while len(running) > _MAX_AHEAD:
          jax.block_until_ready(running.popleft())
      last = step == config.steps or self.stop.due()
      if not last and not self._due(step):
        continue
      with self.ledger.stage("step"):
        jax.block_until_ready(running)
        running.clear()
        # Before a broken state could be saved in the place of a good one.
        progress.check_finite(self.writer)
        progress.report(self.writer, force=last)
      self._evaluate_and_save(state, step, last)
      if last:
        break
    return state

  def _next_batch(self, running: collections.deque[Metrics]) -> Any:
    if not self.batches.ready and running:
      # Devices that still compute are not waiting for data.
      with self.ledger.stage("step"):
        jax.block_until_ready(running[-1])
    with self.ledger.stage("data wait"):
      return self.batches.get()

  def _due(self, step: int) -> bool:
    config = self.setup.experiment.config.train
    return any(
      every and step % every == 0
      for every in (config.eval_every, config.checkpoint_every)
    )

  def _evaluate_and_save(
    self, state: TrainState, step: int, last: bool
  ) -> None:
    config = self.setup.experiment.config.train
    finished = step == config.steps
    score = None
    due = config.eval_every and (finished or step % config.eval_every == 0)
    # A run that was told to stop has little time, and a state to save.
    if due and (finished or not last):
      with self.ledger.stage("evaluation"):
        metrics, score = self.evaluate(state, step)
      self.writer.write(step, metrics)
    due = config.checkpoint_every and step % config.checkpoint_every == 0
    if last or due or score is not None:
      # A checkpoint never is ahead of the metrics on disk.
      self.writer.flush()
      with self.ledger.stage("checkpoint"):
        self.checkpoints.save(step, state, score=score)


class _Progress:
  """Averages metrics between two reports and says how fast a run is."""

  def __init__(
    self,
    setup: Setup,
    ledger: Ledger,
    checkpoints: Checkpoints,
    counters: Callable[[int], dict[str, float]],
    first: int,
  ) -> None:
    config = setup.experiment.config.train
    self._config = config
    self._ledger = ledger
    self._checkpoints = checkpoints
    self._counters = counters
    self._devices = setup.mesh.size
    self._first = self._reported = self._step = first
    self._steps: list[Metrics] = []
    self._last_seconds = ledger.seconds()
    self._start = ledger.elapsed()
    peak = peak_flops(setup.mesh.devices.flat[0])
    # Tracing for the count takes a moment: only where it has a use.
    self._flops_share = (
      None if peak is None else setup.step_flops() / (peak * self._devices)
    )

  def add(self, step: int, metrics: Metrics) -> None:
    """Notes the metrics of a step, still on the devices."""
    self._step = step
    self._steps.append(metrics)

  def report(
    self, writer: MetricsWriter | SilentMetrics, force: bool = False
  ) -> None:
    """Writes and prints if the interval is full.

    Raises:
      UserError: the loss or the gradient is not finite.
    """
    due = self._step % self._config.log_every == 0
    if not self._steps or not (due or force):
      return
    self.check_finite(writer)
    values = mean_metrics(self._steps)
    count = len(self._steps)
    self._steps = []
    values |= self._speed(count)
    writer.write(
      self._step, {f"train/{name}": value for name, value in values.items()}
    )
    counters = self._counters(self._step)
    writer.write(
      self._step, {f"data/{name}": value for name, value in counters.items()}
    )
    bad = sum(n for name, n in counters.items() if name.endswith("/bad"))
    print(self._line(values, int(bad)), flush=True)

  def check_finite(self, writer: MetricsWriter | SilentMetrics) -> None:
    """Checks the steps since the last report.

    Raises:
      UserError: naming the first step whose loss or gradient is not finite;
        the metrics of that step are then on disk.
    """
    first = self._step - len(self._steps) + 1
    for step, metrics in enumerate(self._steps, first):
      for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        value = float(metrics[name])
        if math.isfinite(value):
          continue
        values = mean_metrics([metrics])
        writer.write(step, {f"train/{key}": x for key, x in values.items()})
        writer.flush()
        raise UserError(
          f"the {words} is {value} at step {step}; lower"
          " --config.optimizer.learning_rate or lengthen"
          " --config.optimizer.warmup_steps, in another --workdir"
        )

  def _speed(self, count: int) -> dict[str, float]:
    seconds = self._ledger.seconds()
    spent = {
      name: seconds.get(name, 0.0) - self._last_seconds.get(name, 0.0)
      for name in ("step", "data wait")
    }
    self._last_seconds = seconds
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

  def _line(self, values: dict[str, float], bad_records: int) -> str:
    done = self._step - self._first
    elapsed = self._ledger.elapsed() - self._start
    left = (self._config.steps - self._step) * elapsed / max(done, 1)
    parts = [
      f"[{self._ledger.elapsed():7.1f}s] step {self._step:>6}"
      f"/{self._config.steps}",
      f"loss {values['loss']:.4f}",
      f"lr {values['learning_rate']:.2e}",
      f"grad {values['grad_norm']:.2f}",
      f"{values['examples_per_second']:.1f} ex/s",
      f"{values['examples_per_second_per_device']:.1f} ex/s/device",
      f"data wait {100 * values['data_wait']:.1f} %",
    ]
    if "mfu" in values:
      parts.append(f"MFU {100 * values['mfu']:.1f} %")
    if values["infeasible_fraction"]:
      parts.append(f"infeasible {100 * values['infeasible_fraction']:.1f} %")
    if bad_records:
      parts.append(f"bad records {bad_records}")
    parts.append(f"checkpoint {self._checkpoints.progress}")
    parts.append(f"ETA {format_duration(left)}")
    return "  ".join(parts)
