"""A run whose update costs nothing, for tests of the loop around it."""

import json
import math
import pathlib
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.experiment.datasets import DataSets
from narvl_jax.hosts.host_times import HostTimes
from narvl_jax.reliability.interrupt import EvaluationStopped, StopRequest
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.reliability.trace_request import TraceRequest
from narvl_jax.run.loop import Loop
from narvl_jax.run.run import Run
from narvl_jax.run_folder.goodput import CAUSES, Goodput
from narvl_jax.run_folder.metrics import MetricsWriter
from tests.support.tiny import tiny_config

_BAD_NUMBERS = ("policy", "limit", "spike_factor")


class FakeCheckpoints:
  """Keeps what is saved in memory and logs the calls.

  Attributes:
    saved: what was stored with each step.
    state_steps: (step, step of the state) of every save.
  """

  def __init__(self, workdir: pathlib.Path, log: list[tuple]) -> None:
    self.workdir = workdir
    self.progress = "none"
    self.saved: dict[int, dict[str, Any]] = {}
    self.state_steps: list[tuple[int, int]] = []
    self._log = log

  @property
  def last_step(self) -> int | None:
    return max(self.saved, default=None)

  def check_errors(self) -> None:
    pass

  def wait(self) -> None:
    self._log.append(("wait",))

  def save(
    self, step: int, state: Any, *, score: float | None, run: dict[str, Any]
  ) -> None:
    self._log.append(("save", step, score))
    self.state_steps.append((step, state.step))
    self.progress = f"saved {step}"
    # Through JSON, as on the disk.
    self.saved[step] = json.loads(json.dumps(run))

  def restore(self) -> Any:
    step = self.last_step or 0
    self._log.append(("restore", step))
    return SimpleNamespace(step=step), step, self.saved.get(step, {})


class FakeBatches:
  """Batches that are their own positions."""

  def __init__(self, log: list[tuple]) -> None:
    self.ready = True
    self.position = 0
    self._log = log

  def get(self) -> int:
    self.position += 1
    return self.position - 1

  def seek(self, position: int) -> None:
    self._log.append(("seek", position))
    self.position = position

  def counters(self, position: int) -> dict[str, float]:
    n = position
    return {"a/examples": 16 * n, "a/epochs": n / 4, "a/bad": n // 5}


class FakeRun:
  """A loop with fakes around it; logs what the loop calls, in order.

  Attributes:
    losses: loss by position of the batch; by default the number of the step.
    norms: gradient norm by position of the batch; by default 1.
    stop_at: the step that SIGTERM interrupts.
    robbed: whether the run folder has vanished.
    log: every call, such as ("save", 3, None).
    state_steps: (step, step of the state) of every evaluation.
  """

  def __init__(self, workdir: pathlib.Path, **settings: Any) -> None:
    config = tiny_config()
    config.train.update(
      {"steps": 10, "log_every": 4, "eval_every": 0, "checkpoint_every": 0}
    )
    for name, value in settings.items():
      section = config.bad_numbers if name in _BAD_NUMBERS else config.train
      section[name] = value
    self.config = config
    self.workdir = workdir
    self.log: list[tuple] = []
    self.state_steps: list[tuple[int, int]] = []
    self.losses: dict[int, float] = {}
    self.norms: dict[int, float] = {}
    self.stop_at: int | None = None
    self.stop_in_evaluation = False
    self.robbed = False
    self.ledger = Ledger()
    self.trace = TraceRequest(workdir)
    self.times: HostTimes | None = None
    self.checkpoints = FakeCheckpoints(workdir, self.log)
    self.batches = FakeBatches(self.log)

  @property
  def events(self) -> list[tuple]:
    """The log without waits for checkpoints."""
    return [event for event in self.log if event != ("wait",)]

  @property
  def saved(self) -> dict[int, dict[str, Any]]:
    return self.checkpoints.saved

  def run(self, first: int = 0, stored: dict[str, Any] | None = None) -> Any:
    device = SimpleNamespace(device_kind="NVIDIA H200")
    setup: Any = SimpleNamespace(
      experiment=SimpleNamespace(
        config=self.config, dataset=DataSets(self.config).evaluation
      ),
      mesh=SimpleNamespace(size=8, devices=np.array([device])),
      step_flops=lambda: 1e6,
    )
    checkpoints: Any = self.checkpoints
    batches: Any = self.batches
    mixture: Any = None
    bundles: Any = SimpleNamespace(write=self._write_bundle)
    state: Any = SimpleNamespace(step=first)
    with StopRequest() as stop, MetricsWriter(self.workdir) as writer:
      guard: Any = SimpleNamespace(
        ledger=self.ledger,
        stop=stop,
        trace=self.trace,
        times=self.times,
        check_folder=self._check_folder,
        goodput=lambda: Goodput(3.0, dict.fromkeys(CAUSES, 0.0) | {"other": 1}),
      )
      run = Run(
        setup,
        mixture,
        checkpoints,
        writer,
        guard,
        say=lambda text: self.log.append(("say", text)),
      )
      self.loop = Loop(
        run,
        train_step=lambda state, batch: self.train_step(state, batch),
        batches=batches,
        evaluate=self._evaluate,
        restore=self.checkpoints.restore,
        bundles=bundles,
      )
      return self.loop.train(state, stored or {})

  def train_step(self, state: Any, batch: int) -> Any:
    step = state.step + 1
    if step == self.stop_at:
      signal.raise_signal(signal.SIGTERM)
    loss: float = self.losses.get(batch, float(step))
    norm = self.norms.get(batch, 1.0)
    metrics = {
      "loss": np.float32(loss),
      "grad_norm": np.float32(norm),
      "learning_rate": np.float32(0.5),
      "infeasible_fraction": np.float32(0.25),
      "examples": np.float32(8),
      "skipped": np.float32(not math.isfinite(loss + norm)),
    }
    return SimpleNamespace(step=step), metrics

  def _check_folder(self) -> None:
    if self.robbed:
      raise UserError("the folder is gone")

  def _evaluate(self, state: Any, step: int) -> Any:
    self.log.append(("evaluate", step))
    self.state_steps.append((step, state.step))
    if self.stop_in_evaluation:
      raise EvaluationStopped
    return {"validation/vqa/accuracy": step / 10}, step / 10

  def _write_bundle(self, step: int, position: int, *_: Any) -> pathlib.Path:
    self.log.append(("bundle", step, position))
    return self.workdir / "bundle"


def lines_of(workdir: pathlib.Path) -> list[dict]:
  """Returns the lines of metrics.jsonl."""
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]
