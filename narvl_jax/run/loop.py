"""The training loop, the same for every task."""

import bisect
import collections
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from narvl_jax.data.batches.mixture import share_changes
from narvl_jax.reliability.interrupt import EvaluationStopped
from narvl_jax.run.bad_numbers import BundleWriter, Health, give_up, what_is_bad
from narvl_jax.run.batches import DeviceBatches
from narvl_jax.run.progress import Progress
from narvl_jax.run.run import EVALUATION_DUE, Evaluate, Run
from narvl_jax.run.traces import Traces
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.train_step import Metrics

# Updates in flight on the devices: one computes, one is queued.
_MAX_AHEAD = 2


class _Update(NamedTuple):
  """An update in flight, with its batch and the batch's position."""

  step: int
  position: int
  batch: Any
  metrics: Metrics


@dataclasses.dataclass
class Loop:
  """Trains, evaluates and saves until the last step or a stop request.

  Attributes:
    batches: batches on the devices, starting with the next one.
    evaluate: called every `train.eval_every` steps and after the last step;
      raises `EvaluationStopped` on a stop request.
    restore: returns the newest state (or a fresh one), its step and what was
      stored with it.
  """

  run: Run
  train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
  batches: DeviceBatches
  evaluate: Evaluate
  restore: Callable[[], tuple[TrainState, int, Mapping[str, Any]]]
  bundles: BundleWriter
  health: Health = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    config = self.run.config
    self._config = config
    self._checkpoints, self._writer = self.run.checkpoints, self.run.writer
    self._ledger, self._stop = self.run.guard.ledger, self.run.guard.stop
    self.health = Health(config.bad_numbers.spike_factor)
    self._progress = Progress(
      self.run, self.batches.counters, self.health.counts
    )
    self._traces = Traces(
      config.profile,
      self.run.workdir,
      self.run.guard.trace,
      self._ledger,
    )
    # Positions of the batches at which the mixture weights change.
    self._changes = share_changes(
      [entry.get("weight", 1.0) for entry in config.data.train.values()]
    )

  def train(self, state: TrainState, stored: Mapping[str, Any]) -> TrainState:
    """Trains from the step of `state`; saves a checkpoint where it ends.

    Args:
      state: the initial state; donated.
      stored: what was stored with its checkpoint; empty for a new run.

    Raises:
      UserError: the loss or the gradient is not finite and the policy is to
        stop, or its limit is reached. No state of that step or of a later one
        is saved.
    """
    step = int(state.step)
    self._restore_health(stored, step)
    self._progress.start(step)
    self._stop.begin()
    with self._progress.shown(step), self._traces:
      return self._train(state)

  def _train(self, state: TrainState) -> TrainState:
    steps = self._config.train.steps
    step = int(state.step)
    pending: collections.deque[_Update] = collections.deque()
    while step < steps:
      self._checkpoints.check_errors()
      step += 1
      state = self._begin(state, step, pending)
      stopping = step < steps and self._stop.due()
      last = stopping or step == steps
      saves = last or self._due(step)
      # A broken state must not be saved, so its numbers are checked first.
      bad = self._settle(pending, 0 if saves else _MAX_AHEAD)
      if bad is not None:
        # There may be no room for two states.
        jax.block_until_ready(state)
        del state
        state = self._roll_back(bad)
        step = int(state.step)
        if stopping:
          break
      elif saves:
        ended = self._evaluate_and_save(state, step, last, stopping)
        if ended:
          break
    return state

  def _begin(
    self, state: TrainState, step: int, pending: collections.deque[_Update]
  ) -> TrainState:
    """Dispatches the next update to the devices."""
    position = self.batches.position
    self._traces.before(step, pending[-1].metrics if pending else ())
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      batch = self._next_batch(pending)
      with self._ledger.stage("step"):
        self._ledger.progress(step)
        with self._progress.dispatching():
          state, metrics = self.train_step(state, batch)
    pending.append(_Update(step, position, batch, metrics))
    self._traces.after(step, metrics)
    return state

  def _next_batch(self, pending: collections.deque[_Update]) -> Any:
    if not self.batches.ready and pending:
      # Devices that still compute are not waiting for data.
      with self._ledger.stage("step"):
        jax.block_until_ready(pending[-1].metrics)
    with self._ledger.stage("data wait"):
      return self.batches.get()

  def _due(self, step: int) -> bool:
    train = self._config.train
    return any(
      every and step % every == 0
      for every in (train.eval_every, train.checkpoint_every)
    )

  def _settle(
    self, pending: collections.deque[_Update], ahead: int
  ) -> _Update | None:
    """Waits for all updates except the last `ahead` and checks their numbers.

    Returns:
      The bad update that requires a rollback, if any.
    """
    with self._ledger.stage("step"):
      while len(pending) > ahead:
        update = pending.popleft()
        metrics = update.metrics
        # Raises the error of an update that failed, such as one without enough
        # memory. On a CPU jax aborts if results of it are read.
        jax.block_until_ready(metrics)
        loss, skipped = jax.device_get((metrics["loss"], metrics["skipped"]))
        self._follow_shares(update.position)
        if not skipped:
          self.health.add(float(loss))
        elif self._handle_bad(update):
          pending.clear()
          return update
        self._progress.add(update.step, update.position, metrics)
    return None

  def _restore_health(self, stored: Mapping[str, Any], step: int) -> None:
    self.health.restore(stored)
    self._shares = self._shares_at(stored.get("data_position", step) - 1)

  def _follow_shares(self, position: int) -> None:
    """Restarts the spike statistics where the mixture weights change."""
    shares = self._shares_at(position)
    if shares != self._shares:
      self.health.forget_losses()
    self._shares = shares

  def _shares_at(self, position: int) -> int:
    """Returns the number of weight changes up to a batch."""
    return bisect.bisect_right(self._changes, position)

  def _handle_bad(self, update: _Update) -> bool:
    """Applies `bad_numbers.policy`; returns whether to roll back.

    Raises:
      UserError: the run ends.
    """
    settings = self._config.bad_numbers
    policy, limit = settings.policy, settings.limit
    metrics = {
      name: float(value)
      for name, value in jax.device_get(update.metrics).items()
    }
    bad = f"the {what_is_bad(metrics)} at step {update.step}"
    self.run.guard.check_folder()
    folder = self.bundles.write(
      update.step,
      update.position,
      update.batch,
      metrics,
      self._checkpoints.last_step,
    )
    health = self.health
    done = health.rollbacks if policy == "rollback" else health.skipped_updates
    if policy == "stop" or done >= limit:
      values = {f"train/{name}": value for name, value in metrics.items()}
      self._writer.write(update.step, values)
      self._writer.flush()
      raise give_up(bad, policy, limit, folder)
    self.run.say(f"{bad}: skipped; see {folder}")
    if policy == "skip":
      health.skipped_updates += 1
    return policy == "rollback"

  def _roll_back(self, bad: _Update) -> TrainState:
    """Returns the newest saved state; the data continue after the bad batch."""
    with self._ledger.stage("checkpoint"):
      # A save may still be in progress.
      self._checkpoints.wait()
      state, step, stored = self.restore()
    rollbacks = self.health.rollbacks + 1
    self._restore_health(stored, step)
    self.health.rollbacks = rollbacks
    self.batches.seek(bad.position + 1)
    self._writer.go_back(step)
    self._progress.start(step)
    limit = self._config.bad_numbers.limit
    self.run.say(
      f"rolled back from step {bad.step} to {step}, rollback {rollbacks} of"
      f" at most {limit}; continuing with batch {bad.position + 1}"
    )
    return state

  def _evaluate_and_save(
    self, state: TrainState, step: int, last: bool, stopping: bool
  ) -> bool:
    """Returns whether the loop ends here."""
    train = self._config.train
    if last:
      self._progress.report()
    score = None
    due = train.eval_every and (
      step == train.steps or step % train.eval_every == 0
    )
    missed = bool(due)
    # After a stop request there may be only enough time to save the state.
    if due and not stopping:
      try:
        with self._ledger.stage("evaluation"):
          metrics, score = self.evaluate(state, step)
        self._writer.write(step, metrics)
        missed = False
      except EvaluationStopped:
        last = True
    due = train.checkpoint_every and step % train.checkpoint_every == 0
    if last or due or score is not None:
      with self._ledger.stage("checkpoint"):
        # Waiting may take long, so the folder is checked after it.
        self._checkpoints.wait()
        self.run.guard.check_folder()
      # A checkpoint is never ahead of the metrics on disk.
      self._writer.sync()
      stored = {
        **self.health.to_json(),
        "data_position": self.batches.position,
        "time": time.time(),
        EVALUATION_DUE: missed,
      }
      with self._ledger.stage("checkpoint"):
        self._checkpoints.save(step, state, score=score, run=stored)
    return last
