"""Runs `narvl_jax.train` and interferes (`--what`) in a phase (`--at`).

`--only_process` selects one of several processes.
"""

import ctypes
import os
import pathlib
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from narvl_jax import train as train_command
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.command_line import cli
from narvl_jax.hosts.agreement import StopAgreement
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run import training_run
from narvl_jax.run.batches import DeviceBatches
from narvl_jax.training.setup import Setup
from tests.support import disks

_PHASES = ("compile", "restore", "step", "evaluation", "final", "data")


def _stay_in_c() -> None:
  """Blocks outside Python, where no handlers run, as in a compilation."""
  mutex = ctypes.create_string_buffer(64)
  lock = ctypes.CDLL(None).pthread_mutex_lock
  lock(mutex)
  lock(mutex)


def _terminate(**_: Any) -> None:
  os.kill(os.getpid(), signal.SIGTERM)


def _terminate_in_c() -> None:
  threading.Timer(0.5, _terminate).start()
  _stay_in_c()


def _wait_for_agreement() -> None:
  (agreement,) = _agreements
  agreement._agreed.wait(120)


def _terminate_and_wait() -> None:
  _terminate()
  _wait_for_agreement()


def _stall() -> None:
  # The process stays alive without progress.
  time.sleep(1e6)


def _remove_workdir() -> None:
  shutil.rmtree(pathlib.Path(flags.FLAGS.workdir))


def _wait_for_a_checkpoint() -> pathlib.Path:
  workdir = pathlib.Path(flags.FLAGS.workdir)
  while not (workdir / "checkpoints" / "3").exists():
    time.sleep(0.1)
  return workdir


def _fill_disk() -> None:
  disks.fill(_wait_for_a_checkpoint())


def _short_files() -> None:
  _wait_for_a_checkpoint()
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))


_agreements: list[StopAgreement] = []
_EVENTS: dict[str, Callable[[], None]] = {
  "term": _terminate,
  "term_in_c": _terminate_in_c,
  "term_and_wait": _terminate_and_wait,
  "hang": _stall,
  "remove_workdir": _remove_workdir,
  "fill_disk": _fill_disk,
  "short_files": _short_files,
}


def _before(owner: Any, name: str, event: Callable[..., None]) -> None:
  """Calls `event` before each call of a method."""
  method = getattr(owner, name)

  def wrapped(*args: Any, **kwargs: Any) -> Any:
    event(*args)
    return method(*args, **kwargs)

  setattr(owner, name, wrapped)


def _arrange(phase: str, step: int, event: Callable[[], None]) -> None:
  """Arranges one event: in a phase, at a step if the phase has steps."""
  count = [0]

  def at_step(_: Any, now: int | None = None) -> None:
    if now == step:
      event()

  def at_call(*_: Any) -> None:
    count[0] += 1
    if count[0] == step:
      event()

  if phase == "compile":
    _before(Setup, "compile_step", at_call)
  elif phase == "restore":
    _before(Checkpoints, "restore", at_call)
  elif phase == "step":
    _before(Ledger, "progress", at_step)
  elif phase == "data":
    _before(DeviceBatches, "get", at_call)
  else:
    split = "test" if phase == "final" else "validation"
    evaluate = training_run.evaluate_tasks

    def evaluate_tasks(*args: Any, **kwargs: Any) -> Any:
      if kwargs["split"] == split:
        go_on = kwargs["before_batch"]

        def before_batch() -> None:
          at_call()
          go_on()

        kwargs["before_batch"] = before_batch
      return evaluate(*args, **kwargs)

    training_run.evaluate_tasks = evaluate_tasks


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  settings = flags.FLAGS
  _before(StopAgreement, "begin", _agreements.append)
  if settings.at and settings.only_process in (None, settings.process_id):
    _arrange(settings.at, settings.step, _EVENTS[settings.what])
  elif settings.what == "term_and_wait":
    # Evaluation needs no other host; without waiting, this one would finish.
    _arrange(settings.at, settings.step, _wait_for_agreement)
  train_command.main(argv)


if __name__ == "__main__":
  flags.DEFINE_enum("at", None, _PHASES, "When.")
  flags.DEFINE_enum("what", "term", [*_EVENTS], "What.")
  flags.DEFINE_integer("step", 1, "At which step, batch or call.")
  flags.DEFINE_integer("only_process", None, "To which.")
  train_command.define_flags()
  cli.run(main)
