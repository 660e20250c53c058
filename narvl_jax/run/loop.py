"""The training loop, the same for every task."""

import bisect
import collections
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.batches.mixture import share_changes
from narvl_jax.reliability.interrupt import EvaluationStopped, StopRequest
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run.bad_numbers import (
  BundleWriter,
  Health,
  give_up,
  what_is_bad,
)
from narvl_jax.run.batches import DeviceBatches
from narvl_jax.run.progress import Progress
from narvl_jax.run_folder.metrics import MetricsWriter, SilentMetrics
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.setup import Setup

# Stored with a checkpoint whose evaluation was stopped and is to be made up.
EVALUATION_DUE = "evaluation_due"
# Updates that wait on the devices: one runs, one is queued.
_MAX_AHEAD = 2

Metrics = dict[str, jax.Array]
# State and step -> metrics to write, and the score of the state, if any.
Evaluate = Callable[[TrainState, int], tuple[dict[str, float], float | None]]


class _Update(NamedTuple):
  """An update that was begun, and the batch of that position in the data."""

  step: int
  position: int
  batch: Any
  metrics: Metrics


@dataclasses.dataclass
class Loop:
  """What the loop works with.

  Attributes:
    setup: of the run.
    step: the compiled update.
    batches: on the devices, beginning with the one that comes next.
    writer: of the metrics.
    checkpoints: of the run.
    evaluate: called every `train.eval_every` steps and after the last; raises
      `EvaluationStopped` if the run is to end.
    restore: returns the state of the last checkpoint, or a fresh one, its
      step and what was stored with it.
    bundles: writes down bad updates.
    check_folder: called before a checkpoint or a bundle is written; raises
      `UserError` if the run folder no longer is that of this run.
    ledger: of the run's time.
    stop: asks to end early.
    say: prints a line.
    final_evaluation: examples of the evaluation after the last step, relative
      to those of the ones before it; for the time that is left.
    health: counts bad updates and the like.
  """

  setup: Setup
  step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
  batches: DeviceBatches
  writer: MetricsWriter | SilentMetrics
  checkpoints: Checkpoints
  evaluate: Evaluate
  restore: Callable[[], tuple[TrainState, int, Mapping[str, Any]]]
  bundles: BundleWriter
  check_folder: Callable[[], None]
  ledger: Ledger
  stop: StopRequest
  say: Callable[[str], None]
  final_evaluation: float = 0.0
  health: Health = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    self._config = self.setup.experiment.config
    self.health = Health(self._config.bad_numbers.spike_factor)
    self._progress = Progress(
      self.setup,
      self.ledger,
      self.checkpoints,
      self.writer,
      self.batches.counters,
      self.health.counts,
      self.final_evaluation,
    )
    # Positions of the batches at which the shares of the data change.
    self._changes = share_changes(
      [entry.get("weight", 1.0) for entry in self._config.data.train.values()]
    )

  def run(self, state: TrainState, stored: Mapping[str, Any]) -> TrainState:
    """Trains from the step of `state` to the last, or until told to stop.

    A checkpoint is saved at the step where it ends.

    Args:
      state: to go on from; donated.
      stored: with the checkpoint of the state, empty for a new run.

    Raises:
      UserError: the loss or the gradient is no longer finite, and the policy
        is to stop or its limit is reached. No state of such a step, or of a
        later one, is saved.
    """
    step = int(state.step)
    self._restore_health(stored, step)
    self._progress.start(step)
    self.stop.begin()
    with self._progress.shown(step):
      return self._train(state)

  def _train(self, state: TrainState) -> TrainState:
    steps = self._config.train.steps
    step = int(state.step)
    pending: collections.deque[_Update] = collections.deque()
    while step < steps:
      self.checkpoints.check_errors()
      step += 1
      state = self._begin(state, step, pending)
      stopping = step < steps and self.stop.due()
      last = stopping or step == steps
      saves = last or self._due(step)
      # Before a broken state could be saved in the place of a good one.
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
    """Sends the next update to the devices."""
    position = self.batches.position
    batch = self._next_batch(pending)
    with self.ledger.stage("step"):
      self.ledger.progress(step)
      state, metrics = self.step(state, batch)
    pending.append(_Update(step, position, batch, metrics))
    return state

  def _next_batch(self, pending: collections.deque[_Update]) -> Any:
    if not self.batches.ready and pending:
      # Devices that still compute are not waiting for data.
      with self.ledger.stage("step"):
        jax.block_until_ready(pending[-1].metrics)
    with self.ledger.stage("data wait"):
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
    """Waits for all updates but the last `ahead`, and looks at their numbers.

    Returns:
      The update because of which the run is to go back, if any.
    """
    with self.ledger.stage("step"):
      while len(pending) > ahead:
        update = pending.popleft()
        metrics = update.metrics
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
    """Takes over what was known of the losses before a step."""
    self.health.restore(stored)
    self._shares = self._shares_at(stored.get("data_position", step) - 1)

  def _follow_shares(self, position: int) -> None:
    """Compares no loss with those of batches of other shares.

    Args:
      position: of the next batch whose loss is known.
    """
    shares = self._shares_at(position)
    if shares != self._shares:
      self.health.forget_losses()
    self._shares = shares

  def _shares_at(self, position: int) -> int:
    """Returns how often the shares have changed until a batch."""
    return bisect.bisect_right(self._changes, position)

  def _handle_bad(self, update: _Update) -> bool:
    """Does what the policy says; returns whether the run is to go back.

    Raises:
      UserError: the run is to end.
    """
    settings = self._config.bad_numbers
    policy, limit = settings.policy, settings.limit
    metrics = {
      name: float(value)
      for name, value in jax.device_get(update.metrics).items()
    }
    bad = f"the {what_is_bad(metrics)} at step {update.step}"
    self.check_folder()
    folder = self.bundles.write(
      update.step,
      update.position,
      update.batch,
      metrics,
      self.checkpoints.last_step,
    )
    health = self.health
    done = health.rollbacks if policy == "rollback" else health.skipped_updates
    if policy == "stop" or done >= limit:
      values = {f"train/{name}": value for name, value in metrics.items()}
      self.writer.write(update.step, values)
      self.writer.flush()
      raise give_up(bad, policy, limit, folder)
    self.say(f"{bad}: left out; see {folder}")
    if policy == "skip":
      health.skipped_updates += 1
    return policy == "rollback"

  def _roll_back(self, bad: _Update) -> TrainState:
    """Returns the last state saved; the data go on after the bad batch."""
    with self.ledger.stage("checkpoint"):
      # It may be on its way to the disk.
      self.checkpoints.wait()
      state, step, stored = self.restore()
    rollbacks = self.health.rollbacks + 1
    self._restore_health(stored, step)
    self.health.rollbacks = rollbacks
    self.batches.seek(bad.position + 1)
    self.writer.go_back(step)
    self._progress.start(step)
    limit = self._config.bad_numbers.limit
    self.say(
      f"back from step {bad.step} to {step}, rollback {rollbacks} of at most"
      f" {limit}; on with batch {bad.position + 1}"
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
    # A run that was told to stop has little time, and a state to save.
    due = train.eval_every and (
      step == train.steps or step % train.eval_every == 0
    )
    missed = bool(due)
    if due and not stopping:
      try:
        with self.ledger.stage("evaluation"):
          metrics, score = self.evaluate(state, step)
        self.writer.write(step, metrics)
        missed = False
      except EvaluationStopped:
        last = True
    due = train.checkpoint_every and step % train.checkpoint_every == 0
    if last or due or score is not None:
      with self.ledger.stage("checkpoint"):
        # The one before it may take long.
        self.checkpoints.wait()
        self.check_folder()
      # A checkpoint never is ahead of the metrics on disk.
      self.writer.flush()
      stored = {
        **self.health.to_json(),
        "data_position": self.batches.position,
        "time": time.time(),
        EVALUATION_DUE: missed,
      }
      with self.ledger.stage("checkpoint"):
        self.checkpoints.save(step, state, score=score, run=stored)
    return last
