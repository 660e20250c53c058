"""The state of a run, read from its folder only, without jax.

Only listing and reading of whole files are needed, so a run in a bucket can be
followed from another machine.
"""

import dataclasses
import datetime
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from narvl_jax.files import side_files
from narvl_jax.files.processes import machine
from narvl_jax.files.schemes import COMMIT_FILE
from narvl_jax.files.stores import is_remote
from narvl_jax.hosts.cluster import LOG_FOLDER
from narvl_jax.run_folder import (
  CHECKPOINTS_FOLDER,
  CONFIG_FILE,
  METRICS_FILE,
  lock,
  restarts,
  times,
)
from narvl_jax.run_folder.goodput import goodput
from narvl_jax.terminal.activity import format_duration

# Signs of life of at most so many intervals, or at least so many seconds,
# decide by the clock of this machine; in between, and from the future, the lock
# is watched for a new one.
_ALIVE_RENEWALS = 2
_DEAD_AGE = 60.0
# Lines of metrics that are searched for the last report and evaluation.
_LAST_LINES = 5000
# Groups of metrics that are not a split of the data.
_NO_SPLITS = ("train", "data", "goodput")
_LOG = re.compile(r"host_\d+\.log")
_ERROR = re.compile(r"(error|failed|watchdog): .*")

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class Overview:
  """The state of a run; None where a value is missing or damaged.

  Attributes:
    state: "alive", "no sign of life for TIME", "finished", "stopped: WHY",
      "not started" or "no run".
    host: name of the first host, and its process.
    loss: mean of the last report that is on disk.
    seconds_left: as estimated by that report, less the updates since.
    goodput: useful share of the wall time.
    checkpoint: "step" and "age" (seconds) of the newest one.
    evaluation: "step" and "metrics" of the last one.
    errors: log of a host -> last error since its last start.
  """

  folder: str
  state: str
  alive: bool = False
  host: str | None = None
  phase: str | None = None
  step: int | None = None
  steps: int | None = None
  loss: float | None = None
  updates_per_second: float | None = None
  seconds_left: float | None = None
  goodput: float | None = None
  checkpoint: dict[str, float | None] | None = None
  evaluation: dict[str, Any] | None = None
  restarts: int | None = None
  errors: dict[str, str] = dataclasses.field(default_factory=dict)


def overview(
  folder: pathlib.Path,
  *,
  clock: Callable[[], float] = time.time,
  pause: Callable[[float], Any] = time.sleep,
) -> Overview:
  """Reads the state of a run; damaged files cost their part only.

  Args:
    folder: the run folder.
    clock: returns the Unix time.
    pause: waits for seconds, where the lock has to be watched.
  """
  config = _try(lambda: _object(folder / CONFIG_FILE), None)
  held = _try(lambda: lock.holder(folder), None)
  if config is None and held is None:
    return Overview(str(folder), "no run")
  lines = _try(lambda: list(_metrics_backwards(folder)), [])
  history = _try(lambda: restarts.history(folder), [])
  alive = held is not None and _is_alive(folder, held, clock, pause)
  train = (config or {}).get("train")
  train = train if isinstance(train, dict) else {}
  steps = _number(train.get("steps"))
  report = next((x for x in lines if "train/loss" in x), {})
  held = held or {}
  step = held.get("step", lines[0]["step"] if lines else None)
  speed = _number(report.get("train/examples_per_second"))
  size = _number(train.get("batch_size"))
  return Overview(
    str(folder),
    _state(held, alive, history, bool(lines), clock),
    alive,
    host=f"{held['host']}, {held.get('pid')}" if "host" in held else None,
    phase=held.get("phase"),
    step=step,
    steps=None if steps is None else int(steps),
    loss=_number(report.get("train/loss")),
    updates_per_second=speed / size if speed and size else None,
    seconds_left=_seconds_left(report, step, steps) if held else None,
    goodput=_try(lambda: goodput(times.processes(folder)).share, None),
    checkpoint=_try(lambda: _checkpoint(folder, clock), None),
    evaluation=_evaluation(lines),
    restarts=sum(x["event"] == "restart" for x in history),
    errors=_try(lambda: _errors(folder), {}),
  )


def _try(read: Callable[[], _Value], default: _Value) -> _Value:
  """Returns what `read` does, or the default if a file is missing or damaged.

  Libraries of stores raise errors of many types.
  """
  try:
    return read()
  except Exception:
    return default


def _object(path: pathlib.Path) -> dict[str, Any] | None:
  return side_files.parse_object(path.read_bytes()) if path.is_file() else None


def _number(value: Any) -> float | None:
  return value if type(value) in (int, float) else None


def _metrics_backwards(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the last valid lines of `metrics.jsonl`, the newest first."""
  path = folder / METRICS_FILE
  data = path.read_bytes() if path.is_file() else b""
  for text in reversed(data.splitlines()[-_LAST_LINES:]):
    line = side_files.parse_object(text)
    if line is not None and type(line.get("step")) is int:
      yield line


def _is_alive(
  folder: pathlib.Path,
  held: Mapping[str, Any],
  clock: Callable[[], float],
  pause: Callable[[float], Any],
) -> bool:
  here = machine()
  if here and held.get("machine") == here:
    return lock.is_running(held)
  age = _age(held, clock)
  every = lock.renew_seconds(folder)
  if age is not None and 0 <= age <= _ALIVE_RENEWALS * every:
    return True
  if age is not None and age >= _DEAD_AGE:
    return False
  # The clocks may differ, but the lock of a live run changes.
  for _ in range(round(every) + 1):
    pause(1.0)
    current = _try(lambda: lock.holder(folder), None)
    if current is not None and current.get("time") != held.get("time"):
      return True
  return False


def _age(held: Mapping[str, Any], clock: Callable[[], float]) -> float | None:
  """Returns the seconds since a sign of life; None if it is damaged."""
  moment = _try(lambda: datetime.datetime.fromisoformat(held["time"]), None)
  return None if moment is None else clock() - moment.timestamp()


def _state(
  held: Mapping[str, Any],
  alive: bool,
  history: list[dict[str, Any]],
  has_metrics: bool,
  clock: Callable[[], float],
) -> str:
  if alive:
    return "alive"
  if held:
    age = _age(held, clock)
    if age is None:
      return "no sign of life"
    return f"no sign of life for {format_duration(max(age, 0.0))}"
  if history and history[-1]["event"] == "end":
    return f"stopped: {history[-1]['how']}"
  return "finished" if has_metrics else "not started"


def _seconds_left(
  report: Mapping[str, Any], step: int | None, steps: float | None
) -> float | None:
  left = _number(report.get("train/seconds_left"))
  if left is None or step is None or steps is None:
    return None
  share = max(steps - step, 0) / max(steps - report["step"], 1)
  return left * min(share, 1.0)


def _checkpoint(
  folder: pathlib.Path, clock: Callable[[], float]
) -> dict[str, float | None] | None:
  """Returns "step" and "age" of the newest checkpoint, None without one."""
  places = {
    int(path.name): path
    for path in (folder / CHECKPOINTS_FOLDER).iterdir()
    if path.name.isdecimal()
  }
  for step, path in sorted(places.items(), reverse=True):
    if is_remote(path) and not (path / COMMIT_FILE).exists():
      continue
    record = path / "record" / "record.json"
    age = _try(lambda file=record: clock() - file.stat().st_mtime, None)
    return {"step": step, "age": age}
  return None


def _evaluation(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
  """Returns "step" and "metrics" of the last evaluation, None without one."""
  for line in lines:
    metrics = {
      name: value
      for name, value in line.items()
      if name.count("/") >= 2 and name.partition("/")[0] not in _NO_SPLITS
    }
    if metrics:
      return {"step": line["step"], "metrics": metrics}
  return None


def _errors(folder: pathlib.Path) -> dict[str, str]:
  found = {}
  logs = (x for x in (folder / LOG_FOLDER).iterdir() if _LOG.fullmatch(x.name))
  for path in sorted(logs):
    data = _try(path.read_bytes, b"") if path.is_file() else b""
    # A line that begins with dashes is the start of a process.
    for line in reversed(data.decode(errors="replace").splitlines()):
      if line.startswith("--- "):
        break
      if _ERROR.match(line):
        found[path.stem] = line
        break
  return found
