"""The restarts of a run: why it ended before, and the work that was lost."""

import contextlib
import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from narvl_jax.files import side_files
from narvl_jax.run_folder import METRICS_FILE, times
from narvl_jax.run_folder.lock import now
from narvl_jax.terminal.activity import format_duration
from narvl_jax.terminal.text import format_count

RESTARTS_FILE = "restarts.jsonl"

# Required keys by event, and types of all keys.
_NEEDED = {
  "end": {"how"},
  "restart": {
    *("how", "time", "lost_seconds", "down_seconds", "from_step", "damaged")
  },
}
_KINDS = {
  "how": str,
  "time": (str, type(None)),
  "since": (str, type(None)),
  "phase": (str, type(None)),
  "code": int,
  "step": (int, type(None)),
  "from_step": int,
  "lost_seconds": (int, float),
  "down_seconds": (int, float),
  "damaged": list,
}
_SECONDS = ("lost_seconds", "down_seconds")
_LONGEST = 1e12


def record_end(
  workdir: pathlib.Path,
  how: str,
  *,
  code: int,
  stage: str | None,
  step: int,
  since: str | None,
  moment: str | None = None,
) -> None:
  """Appends that a run ends unfinished; disk errors are ignored."""
  with contextlib.suppress(OSError):
    side_files.append_line(
      workdir / RESTARTS_FILE,
      {
        "event": "end",
        "time": moment or now(),
        "how": how,
        "code": code,
        "phase": stage,
        "step": step,
        "since": since,
      },
    )


def record_death(workdir: pathlib.Path, held: Mapping[str, Any]) -> None:
  """Appends that a run was killed, and its time, from its lock."""
  if times.is_record(held):
    account = {x: held[x] for x in times.KEYS if x in held}
    times.record(workdir, account, held["time"])
  record_end(
    workdir,
    "ended unexpectedly: killed, or the machine lost",
    code=1,
    stage=held.get("phase", "?"),
    step=held.get("step", 0),
    since=held.get("since"),
    moment=held.get("time"),
  )


def record_restart(
  workdir: pathlib.Path,
  *,
  step: int,
  saved: float | None,
  damaged: Sequence[str] = (),
) -> list[dict[str, Any]]:
  """Appends a record for every end since the last restart.

  Args:
    step: the step that is resumed; 0 for the start.
    saved: Unix time of its checkpoint; None if there is none.
    damaged: damage of newer checkpoints, a line each.

  Returns:
    The records: "how" the run ended, in "phase" at "step"; "lost_seconds" of
    work since the checkpoint, "down_seconds" until the next start, "from_step"
    and "damaged". Empty if the run had finished.

  Raises:
    OSError: the file cannot be written.
  """
  events = side_files.repair_lines(workdir / RESTARTS_FILE, _is_record)
  restarts = [i for i, x in enumerate(events) if x.get("event") == "restart"]
  ends = events[restarts[-1] + 1 :] if restarts else events
  if not ends:
    if not damaged:
      return []
    ends = [{"how": "had finished", "time": _last_written(workdir)}]
  records = []
  for end, following in zip(ends, [*ends[1:], {}], strict=True):
    moment = _time(following.get("since")) or _time(now())
    last_sign = _time(end.get("time")) or moment
    assert moment is not None
    assert last_sign is not None
    record = {
      "event": "restart",
      "time": now(),
      "how": end["how"],
      "phase": end.get("phase"),
      "step": end.get("step"),
      "lost_seconds": _lost(end, last_sign, step, saved),
      "down_seconds": _seconds(last_sign, moment),
      "from_step": step,
      "damaged": [] if following else list(damaged),
    }
    side_files.append_line(workdir / RESTARTS_FILE, record)
    records.append(record)
  return records


def _last_written(workdir: pathlib.Path) -> str | None:
  """Returns when a finished run ended, None if unknown."""
  try:
    seconds = (workdir / METRICS_FILE).stat().st_mtime
  except OSError:
    return None
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def _lost(
  end: Mapping[str, Any],
  last_sign: datetime.datetime,
  step: int,
  saved: float | None,
) -> float:
  """Returns the seconds of work between a checkpoint and an end."""
  if end.get("code") == 0 and end.get("step", 0) <= step:
    return 0.0
  # A run that never saved has lost everything since its start.
  starts = [_time(end.get("since"))]
  if saved is not None:
    starts.append(datetime.datetime.fromtimestamp(saved, datetime.UTC))
  known = [_seconds(start, last_sign) for start in starts if start]
  return min(known, default=0.0)


def _seconds(start: datetime.datetime, end: datetime.datetime) -> float:
  return round(max((end - start).total_seconds(), 0.0), 1)


def history(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records in order, without damaged ones."""
  return side_files.read_lines(workdir / RESTARTS_FILE, _is_record)


def _is_record(record: Mapping[str, Any]) -> bool:
  """Returns whether a record has all required keys, of the right types."""
  event = record.get("event")
  needed = _NEEDED.get(event) if isinstance(event, str) else None
  if needed is None or not needed <= record.keys():
    return False
  return (
    all(
      isinstance(record[name], kinds)
      for name, kinds in _KINDS.items()
      if name in record
    )
    and all(isinstance(line, str) for line in record.get("damaged", ()))
    and all(0 <= record.get(name, 0) < _LONGEST for name in _SECONDS)
  )


def describe(record: Mapping[str, Any]) -> str:
  """Returns one line about a restart."""
  phase, step = record.get("phase"), record.get("step")
  where = "" if phase is None else f' in phase "{phase}"'
  where += "" if step is None else f" at step {step}"
  lost = f"{format_duration(record['lost_seconds'])} of work"
  steps = (step or 0) - record["from_step"]
  if steps > 0:
    lost += f" ({format_count(steps, 'step')})"
  text = (
    f"{record['how']}{where}; {lost} lost, down for"
    f" {format_duration(record['down_seconds'])}, resumed from step"
    f" {record['from_step']}"
  )
  return "; ".join([text, *record["damaged"]])


def summary(workdir: pathlib.Path) -> list[str]:
  """Returns lines about all restarts of a run; none if there were none."""
  records = [x for x in history(workdir) if x.get("event") == "restart"]
  if not records:
    return []
  lost = sum(record["lost_seconds"] for record in records)
  down = sum(record["down_seconds"] for record in records)
  return [
    f"restarts {len(records)}, {format_duration(lost)} of work lost, down for"
    f" {format_duration(down)}:",
    *(f"  {x['time'][:19]} {describe(x)}" for x in records),
  ]


def _time(text: str | None) -> datetime.datetime | None:
  try:
    moment = datetime.datetime.fromisoformat(text or "")
  except ValueError:
    return None
  # Differences need the time zone.
  return moment if moment.tzinfo else None
