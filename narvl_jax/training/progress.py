"""The line of numbers that a run prints every few steps."""

from collections.abc import Callable, Mapping

import jax

from narvl_jax.training.checkpoints import Checkpoints
from narvl_jax.training.flops import peak_flops
from narvl_jax.training.ledger import Ledger
from narvl_jax.training.metrics import (
  MetricsWriter,
  SilentMetrics,
  format_duration,
  mean_metrics,
)
from narvl_jax.training.setup import Setup


class Progress:
  """Averages metrics between two reports and says how fast a run is."""

  def __init__(
    self,
    setup: Setup,
    ledger: Ledger,
    checkpoints: Checkpoints,
    writer: MetricsWriter | SilentMetrics,
    counters: Callable[[int], Mapping[str, float]],
    health: Callable[[], Mapping[str, int]],
  ) -> None:
    """Takes what is reported.

    Args:
      setup: of the run.
      ledger: of its time.
      checkpoints: of the run.
      writer: of the metrics.
      counters: position in the data -> `TrainBatches.counters`.
      health: returns the counts of bad updates and the like.
    """
    config = setup.experiment.config.train
    self._config = config
    self._ledger = ledger
    self._checkpoints = checkpoints
    self._writer = writer
    self._counters = counters
    self._health = health
    self._devices = setup.mesh.size
    peak = peak_flops(setup.mesh.devices.flat[0])
    # Tracing for the count takes a moment: only where it has a use.
    self._flops_share = (
      None if peak is None else setup.step_flops() / (peak * self._devices)
    )

  def start(self, step: int) -> None:
    """Begins, or begins anew, with the update after `step`."""
    self._first = self._step = step
    self._steps: list[Mapping[str, jax.Array]] = []
    self._last_seconds = self._ledger.seconds()
    self._start = self._ledger.elapsed()

  def add(
    self, step: int, position: int, metrics: Mapping[str, jax.Array]
  ) -> None:
    """Notes an update that was computed; reports if the interval is full.

    Args:
      step: of the update.
      position: of its batch in the data.
      metrics: of the update.
    """
    self._step = step
    self._position = position
    self._steps.append(metrics)
    if step % self._config.log_every == 0:
      self.report()

  def report(self) -> None:
    """Writes and prints what came since the last report, if anything."""
    if not self._steps:
      return
    values = mean_metrics(self._steps)
    count = len(self._steps)
    self._steps = []
    values |= {**self._speed(count), **self._health()}
    counters = self._counters(self._position + 1)
    self._writer.write(
      self._step,
      {
        **{f"train/{name}": value for name, value in values.items()},
        **{f"data/{name}": value for name, value in counters.items()},
      },
    )
    bad = sum(n for name, n in counters.items() if name.endswith("/bad"))
    print(self._line(values, int(bad)), flush=True)

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

  def _line(self, values: Mapping[str, float], bad_records: int) -> str:
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
    parts += [
      f"{name.replace('_', ' ')} {count}"
      for name, count in self._health().items()
      if count
    ]
    parts.append(f"checkpoint {self._checkpoints.progress}")
    parts.append(f"ETA {format_duration(left)}")
    return "  ".join(parts)
