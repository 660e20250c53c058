"""The time that a run spent in each stage: `time.jsonl`, a line per process."""

import contextlib
import datetime
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from narvl_jax.files import side_files
from narvl_jax.run_folder.lock import holder, now

TIMES_FILE = "time.jsonl"
_COUNTS = ("from_step", "step", "updates")
_SAME_START = 0.5  # Seconds between the starts of records of one process.
KEYS = (*_COUNTS, "seconds")


def record(
  workdir: pathlib.Path, account: Mapping[str, Any], moment: str | None = None
) -> None:
  """Appends the account of a process; disk errors are ignored.

  Args:
    account: see `Ledger.account`.
    moment: when the process ended; now if None.
  """
  with contextlib.suppress(OSError):
    line = {"time": moment or now(), **account}
    side_files.append_line(workdir / TIMES_FILE, line)


def history(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records in order, without damaged ones.

  Each has "time", when that process ended or gave its last sign of life, and
  "seconds" by stage; those of newer versions also "from_step", "step" and
  "updates" (`Ledger.account`).

  Raises:
    OSError: the file cannot be read.
  """
  records = side_files.read_lines(workdir / TIMES_FILE, is_record)
  # Earlier versions recorded a process that was stopped twice.
  following = [*map(_start, records[1:]), math.inf]
  return [
    record
    for record, start in zip(records, following, strict=False)
    if abs(_start(record) - start) > _SAME_START
  ]


def _start(record: Mapping[str, Any]) -> float:
  """Returns the Unix time at which a process began."""
  end = datetime.datetime.fromisoformat(record["time"]).timestamp()
  return end - sum(record["seconds"].values())


def processes(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the history and the process that holds the lock, if any.

  Raises:
    OSError: a file cannot be read.
  """
  held = holder(workdir)
  current = [] if held is None or not is_record(held) else [held]
  return history(workdir) + current


def is_record(line: Mapping[str, Any]) -> bool:
  """Returns whether a record has valid values."""
  try:
    moment = datetime.datetime.fromisoformat(line["time"])
  except (KeyError, TypeError, ValueError):
    return False
  seconds = line.get("seconds")
  counts = [line[name] for name in _COUNTS if name in line]
  return (
    moment.tzinfo is not None
    and isinstance(seconds, dict)
    and all(
      type(x) in (int, float) and math.isfinite(x) and x >= 0
      for x in seconds.values()
    )
    and len(counts) in (0, len(_COUNTS))
    and all(type(x) is int and x >= 0 for x in counts)
  )
