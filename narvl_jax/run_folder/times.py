"""The time that a run spent in each stage: `time.jsonl`, a line per start."""

import contextlib
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from narvl_jax.files import side_files
from narvl_jax.run_folder.lock import now

TIMES_FILE = "time.jsonl"


def record(workdir: pathlib.Path, seconds: Mapping[str, float]) -> None:
  """Appends the seconds of every stage; disk errors are ignored."""
  rounded = {name: round(value, 3) for name, value in seconds.items()}
  with contextlib.suppress(OSError):
    line = {"time": now(), "seconds": rounded}
    side_files.append_line(workdir / TIMES_FILE, line)


def history(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records in order, without damaged ones.

  Each has "time", when that process ended, and "seconds" by stage. Processes
  that were killed have none.

  Raises:
    OSError: the file cannot be read.
  """
  return side_files.read_lines(workdir / TIMES_FILE, _is_record)


def _is_record(line: Mapping[str, Any]) -> bool:
  seconds = line.get("seconds")
  return (
    isinstance(line.get("time"), str)
    and isinstance(seconds, dict)
    and all(
      type(x) in (int, float) and math.isfinite(x) for x in seconds.values()
    )
  )
