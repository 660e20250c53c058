"""Whole runs: from nothing to the end, stopped and resumed, and dry.

The run that is stopped must end where the one that is not ends, bit by bit.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from absl import logging as absl_logging

from narvl_jax import train as train_command
from narvl_jax.checkpointing.record import read_leaf, read_record
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import Config, to_json
from narvl_jax.reliability import guard as guard_lib
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run import training_run
from narvl_jax.run_folder import times
from tests.support.small_run import depends_on_clock
from tests.support.terminal import masked
from tests.support.tiny import tiny_config

# Compilations of whole programs, also those that a cache answers.
_COMPILATION = "/jax/core/compile/backend_compile_duration"


def _config() -> Config:
  config = tiny_config()
  config.train.log_every = 1
  # Of 4000 records; the final evaluation is no matter here.
  config.train.eval_examples = 8
  config.evaluation.max_examples = 8
  return config


@dataclasses.dataclass
class Outcome:
  workdir: pathlib.Path
  report: dict[str, Any] | None
  output: str
  # At its end: a later run resumes in the same folder.
  metrics: str
  # Compilations when an evaluation began and when it ended.
  compilations: list[tuple[int, int]]
  # What libraries logged.
  warnings: list[str]


class Runner:
  """Runs `train` with few examples in the final evaluation."""

  def __init__(self) -> None:
    self.counter = 0
    self.evaluations: list[tuple[int, int]] = []
    self.stop_after_evaluation: int | None = None
    self.stop_before_evaluation: int | None = None
    self._evaluate = training_run.evaluate_tasks
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event: str, duration_secs: float, **_: Any) -> None:
    del duration_secs
    self.counter += event == _COMPILATION

  def evaluate(self, *args: Any, **settings: Any) -> Any:
    before = self.counter
    settings["max_examples"] = 8
    if len(self.evaluations) + 1 == self.stop_before_evaluation:
      os.kill(os.getpid(), signal.SIGTERM)
    result = self._evaluate(*args, **settings)
    self.evaluations.append((before, self.counter))
    if len(self.evaluations) == self.stop_after_evaluation:
      os.kill(os.getpid(), signal.SIGTERM)
    return result


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
  """Returns an uninterrupted run, one that is stopped twice, and its end.

  It is first stopped after the evaluation of step 3, and then in that of the
  last step.
  """
  runner = Runner()
  patch = pytest.MonkeyPatch()
  patch.setattr(training_run, "evaluate_tasks", runner.evaluate)
  found = {}
  whole = tmp_path_factory.mktemp("whole") / "run"
  stopped = tmp_path_factory.mktemp("stopped") / "run"
  for name, workdir in (
    ("whole", whole),
    ("stopped", stopped),
    ("stopped again", stopped),
    ("resumed", stopped),
  ):
    runner.evaluations = []
    runner.stop_after_evaluation = 1 if name == "stopped" else None
    runner.stop_before_evaluation = 1 if name == "stopped again" else None
    with _logged_warnings() as warnings:
      # A worker process that prepares the data must not show either.
      workers = int(name == "stopped again")
      output, report = _captured(workdir, num_workers=workers)
    found[name] = Outcome(
      workdir,
      report,
      output,
      (workdir / "metrics.jsonl").read_text(),
      runner.evaluations,
      warnings,
    )
  patch.undo()
  return found


def _captured(workdir: pathlib.Path, num_workers: int = 0) -> tuple[str, Any]:
  """Returns what `train` prints and returns, or its exit code."""
  output = io.StringIO()
  config = _config()
  config.data.num_workers = num_workers
  with contextlib.redirect_stdout(output):
    try:
      report = training_run.train(config, workdir, ledger=Ledger())
    except SystemExit as error:
      report = error.code
  return output.getvalue(), report


@contextlib.contextmanager
def _logged_warnings() -> Iterator[list[str]]:
  messages: list[str] = []
  handler = logging.Handler(logging.WARNING)
  handler.emit = lambda record: messages.append(record.getMessage())
  loggers = [logging.getLogger(), absl_logging.get_absl_logger()]
  for logger in loggers:
    logger.addHandler(handler)
  yield messages
  for logger in loggers:
    logger.removeHandler(handler)


def _lines(text: str) -> list[dict[str, Any]]:
  return [json.loads(line) for line in text.splitlines()]


def _metrics(outcome: Outcome) -> list[dict[str, Any]]:
  """Returns the lines of a run, without what depends on the clock."""
  lines = _lines(outcome.metrics)
  for line in lines:
    for name in list(line):
      if depends_on_clock(name):
        del line[name]
  return lines


def test_run_folder(outcomes):
  folder = outcomes["whole"].workdir
  assert {path.name for path in folder.iterdir()} == {
    *("checkpoints", "config.json", "environment.json", "evaluation.json"),
    *("evaluations", "metrics.jsonl", "predictions", "sharding.txt"),
    *("tensorboard", "time.jsonl", "vocabulary"),
  }
  (spent,) = times.history(folder)
  assert {"init", "step", "evaluation"} <= spent["seconds"].keys()
  assert json.loads((folder / "config.json").read_text()) == to_json(_config())
  report = json.loads((folder / "evaluation.json").read_text())
  assert report == outcomes["whole"].report
  assert report["split"] == "test"
  assert report["step"] == 6
  kept = folder / "evaluations" / "test-6-greedy-max8.json"
  assert json.loads(kept.read_text()) == report


def test_metrics_of_a_run(outcomes):
  lines = _metrics(outcomes["whole"])
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert all(np.isfinite(line["train/loss"]) for line in lines)
  # Warm-up over two steps, from zero.
  rates = [line["train/learning_rate"] for line in lines]
  assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
  evaluated = [x["step"] for x in lines if "validation/vqa/accuracy" in x]
  assert evaluated == [3, 6]
  assert "test/vqa/accuracy" in lines[-1]
  assert lines[-1]["test/step"] == 6
  assert [line["data/vqa/examples"] for line in lines] == [4, 8, 12, 16, 20, 24]


def test_stopped_run_saves_and_prints_how_to_resume(outcomes):
  stopped = outcomes["stopped"]
  assert stopped.report == 0
  assert stopped.output.splitlines()[-1] == (
    "SIGTERM: stopped at step 4; run the same command again to resume: "
    + shlex.join(sys.orig_argv)
  )
  lines = _lines(stopped.metrics)
  assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_resumed_run_is_that_without_the_stop(outcomes):
  again, last = outcomes["stopped again"], outcomes["resumed"]
  assert "resumed from the checkpoint of step 4" in again.output
  assert again.report == 0
  assert "validation/vqa/accuracy" not in _lines(again.metrics)[-1]
  assert "resumed from the checkpoint of step 6" in last.output
  assert "evaluating step 6: its evaluation was stopped" in last.output
  states = []
  for name in ("whole", "resumed"):
    folder = outcomes[name].workdir / "checkpoints" / "6"
    leaves = read_record(folder).leaves
    states.append({leaf: read_leaf(folder, leaf) for leaf in leaves})
  # Parameters, two moments, averages: nothing was left out.
  assert len(states[0]) > 4 * 40
  assert states[0].keys() == states[1].keys()
  for name, leaf in states[0].items():
    np.testing.assert_array_equal(leaf, states[1][name], err_msg=name)
  assert _metrics(outcomes["whole"]) == _metrics(outcomes["resumed"])
  assert outcomes["whole"].report == outcomes["resumed"].report
  scores = [
    read_record(outcomes[name].workdir / "checkpoints" / "6").score
    for name in ("whole", "resumed")
  ]
  assert scores[0] == scores[1] is not None


def test_checkpoints_of_stopped_and_resumed_run(outcomes):
  folder = outcomes["resumed"].workdir / "checkpoints"
  # The last two, and the best: scores are equal, so the later one of them.
  assert {path.name for path in folder.iterdir()} == {"4", "6"}
  environment = json.loads(
    (outcomes["resumed"].workdir / "environment.json").read_text()
  )
  assert environment["step"] == 6
  assert [start["step"] for start in environment["previous"]] == [0, 4]


def test_nothing_is_compiled_again(outcomes):
  (_, first_end), (second_start, second_end), (last_start, _) = outcomes[
    "whole"
  ].compilations
  # Between the evaluations of step 3 and step 6, and after it.
  assert second_start == first_end
  assert last_start == second_end == second_start


def test_output_of_a_run(outcomes, golden):
  whole = outcomes["whole"]
  golden("terminal/train.txt", masked(whole.output, RUN=whole.workdir))
  lines = [line for line in whole.output.splitlines() if " ex/s " in line]
  assert len(lines) == 6
  assert max(len(x) for x in lines if "infeasible" not in x) <= 80
  # Every loss and every metric keeps all its digits in the file.
  assert "train/grad_norm" in _lines(whole.metrics)[0]


def test_shares_of_the_time_add_up(outcomes):
  table = outcomes["whole"].output.split("where the time went:\n")[1]
  shares = {
    line.split()[0]: float(line.split()[-2])
    for line in table.splitlines()
    if line.endswith("%")
  }
  assert shares.pop("total") == 100.0
  assert sum(shares.values()) == pytest.approx(100.0)
  assert {"init", "compile", "step", "data", "checkpoint", "evaluation"} <= {
    *shares
  }


def test_runs_are_quiet(outcomes):
  for name in ("whole", "stopped", "stopped again", "resumed"):
    # Orbax warns about saves that are faster than this disk.
    assert [
      x for x in outcomes[name].warnings if "previous save" not in x
    ] == []


def test_finished_run_is_only_evaluated(outcomes, capsys, monkeypatch):
  run = Runner()
  monkeypatch.setattr(training_run, "evaluate_tasks", run.evaluate)
  monkeypatch.setattr(training_run, "_train", None)
  whole = outcomes["whole"]
  assert training_run.train(_config(), whole.workdir) == whole.report
  assert (whole.workdir / "metrics.jsonl").read_text() == whole.metrics
  assert "resumed from the checkpoint of step 6" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_removed_folder_is_not_created_again(
  outcomes, tmp_path, monkeypatch, split
):
  """Between two looks at the lock, before a save or the last report."""
  run = Runner()
  workdir = tmp_path / "run"
  if split == "test":
    shutil.copytree(outcomes["whole"].workdir, workdir)

  def evaluate(*args: Any, **settings: Any) -> Any:
    shutil.rmtree(workdir)
    return run.evaluate(*args, **settings)

  monkeypatch.setattr(training_run, "evaluate_tasks", evaluate)
  monkeypatch.setattr(guard_lib, "renew_seconds", lambda workdir: 1e6)
  with pytest.raises(UserError, match=r"run or its lock.json no longer exists"):
    training_run.train(_config(), workdir)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiles", [False, True])
def test_dry_run_writes_nothing(tmp_path, capsys, compiles):
  runner = Runner()
  with guard_lib.Guard(tmp_path / "run", Ledger()) as guard:
    training_run.print_plan(
      _config(), tmp_path / "run", guard, compiles=compiles
    )
  assert bool(runner.counter) == compiles
  assert not list(tmp_path.iterdir())
  output = capsys.readouterr().out
  for pattern in (
    r"batch:\n  image +8x48x48x3 +uint8\n",
    r"  labels +8x6 +int32\n",
    r"  parameter +shape +count +lr +decay\n",
    r"params/embed_tokens +\d+x32 +vocab,embed +tensor,fsdp ",
    r"whole training state: [\d,]+ bytes a device\n",
    r"memory per device: arguments [\d.]+ .?B, temporaries [\d.]+ .?B"
    if compiles
    else r"--dry_run=compile prints the memory of the update",
    r"[\d.e+]+ FLOPs per step; dry run, nothing was written\n$",
  ):
    assert re.search(pattern, output), pattern


def test_sharding_is_explained_without_compiling(tmp_path, capsys):
  config = _config()
  config.mesh.update({"data": 1, "fsdp": 4, "tensor": 2})
  workdir = tmp_path / "run"
  with guard_lib.Guard(workdir, Ledger()) as guard:
    training_run.print_plan(config, workdir, guard, only_sharding=True)
  assert not list(tmp_path.iterdir())
  output = capsys.readouterr().out
  assert "mesh data=1 fsdp=4 tensor=2\n" in output
  # [vocabulary, width] over two and four devices.
  assert re.search(
    r"params/embed_tokens +(\d+)x32 .* (\d+)x8 +[\d,]+\n", output
  )
  assert "compiling" not in output


def test_mistake_in_the_data_leaves_no_folder(tmp_path):
  config = _config()
  del config.data.train.vqa["weight"]
  config.data.train.vqa.weight = -1.0
  with pytest.raises(UserError, match=r"weight is -1.0; it must be 0 or more"):
    training_run.train(config, tmp_path / "run")
  assert not list(tmp_path.iterdir())


class Flags:
  def __init__(self, workdir: pathlib.Path) -> None:
    self.config = None
    self.workdir = str(workdir)
    self.dry_run = False
    self.explain_sharding = False
    self.distributed = "off"
    self.coordinator_address = self.num_processes = self.process_id = None
    self.start_timeout = self.heartbeat_timeout = 1


@pytest.fixture
def interruptible():
  """Python's own handler: shells start background jobs with SIGINT ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
  ("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")]
)
def test_signal_outside_of_the_loop(
  tmp_path, monkeypatch, capsys, number, name
):
  def interrupted(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), number)

  monkeypatch.setattr(training_run, "train_guarded", interrupted)
  monkeypatch.setattr(train_command.flags, "FLAGS", Flags(tmp_path))
  with pytest.raises(SystemExit) as error:
    train_command.main([])
  # Nothing was lost; but who presses Ctrl-C breaks off what called it.
  assert error.value.code == (0 if name == "SIGTERM" else 130)
  assert capsys.readouterr().err == (
    f"{name}: stopped; run the same command again to resume:"
    f" {shlex.join(sys.orig_argv)}\n"
  )


@pytest.mark.parametrize(
  "saved", ["", "checkpoints/6", "a/checkpoints/6", "vqa/.convert/0"]
)
def test_failure_ends_with_what_to_do(tmp_path, monkeypatch, capsys, saved):
  (tmp_path / saved).mkdir(parents=True, exist_ok=True)

  def fail(*_: Any, **__: Any) -> None:
    raise MemoryError("too much")

  monkeypatch.setattr(training_run, "train_guarded", fail)
  monkeypatch.setattr(train_command.flags, "FLAGS", Flags(tmp_path))
  with pytest.raises(SystemExit) as error:
    train_command.main([])
  assert error.value.code == 1
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith("Traceback")
  assert lines[-1] == (
    f"failed: MemoryError: too much; what was saved in {tmp_path} is intact;"
    " remove the cause, then run the same command again to resume"
    if saved
    else f"failed: MemoryError: too much; nothing was saved yet in {tmp_path}"
  )


def test_mistakes_of_the_user_are_left_to_the_command_line(
  tmp_path, monkeypatch
):
  def fail(*_: Any, **__: Any) -> None:
    raise UserError("wrong")

  monkeypatch.setattr(training_run, "train_guarded", fail)
  monkeypatch.setattr(train_command.flags, "FLAGS", Flags(tmp_path))
  with pytest.raises(UserError, match="wrong"):
    train_command.main([])
