"""Goodput: the share of a run's wall time spent in updates that it kept."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from narvl_jax.terminal.activity import format_duration

STALL = "stall"
# Stage of the ledger -> cause of lost time.
_CAUSES = {
  "import": "start-up",
  "init": "start-up",
  "compile": "compilation",
  "data wait": "data wait",
  "evaluation": "evaluation",
  "checkpoint": "checkpoint",
  STALL: "stalls",
}
_LOST_WORK = "lost work"
_DOWN = "between processes"
CAUSES = (*dict.fromkeys(_CAUSES.values()), _LOST_WORK, _DOWN, "other")


class Goodput(NamedTuple):
  """How the wall time since the first start of a run was spent.

  Attributes:
    useful: seconds of updates that are part of the current state.
    lost: {cause: seconds}, with every one of `CAUSES`.
  """

  useful: float
  lost: dict[str, float]

  @property
  def wall(self) -> float:
    """Seconds from the first start to the last sign of life."""
    return self.useful + sum(self.lost.values())

  @property
  def share(self) -> float:
    """The useful share of the wall time."""
    return self.useful / (self.wall or 1.0)

  def metrics(self) -> dict[str, float]:
    """Returns shares of the wall time, which add up to 1, by name."""
    wall = self.wall or 1.0
    names = {x: x.replace(" ", "_").replace("-", "_") for x in CAUSES}
    lost = {names[cause]: self.lost[cause] / wall for cause in CAUSES}
    return {
      f"goodput/{name}": share
      for name, share in {"useful": self.share, **lost}.items()
    }

  def __str__(self) -> str:
    """One line: the useful share, then the causes from 1 % on."""
    largest = sorted(self.lost.items(), key=lambda x: -x[1])
    wall = self.wall or 1.0
    causes = ", ".join(
      f"{name} {100 * seconds / wall:.1f} %"
      for name, seconds in largest
      if seconds >= 0.01 * wall
    )
    text = f"goodput {100 * self.share:.1f} % of {format_duration(self.wall)}"
    return f"{text}; lost: {causes}" if causes else text


def goodput(processes: Sequence[Mapping[str, Any]]) -> Goodput:
  """Adds up the records of all processes of a run (`times.history`).

  The step seconds of a process are divided equally among its updates. An update
  is kept if no later process resumed from before it; a rollback repeats updates
  within a process. Records of earlier versions do not count updates: theirs are
  all kept.
  """
  useful = 0.0
  lost = dict.fromkeys(CAUSES, 0.0)
  next_start = reached = None
  for record in reversed(processes):
    seconds = record["seconds"]
    end = datetime.datetime.fromisoformat(record["time"]).timestamp()
    if next_start is not None:
      lost[_DOWN] += max(next_start - end, 0.0)
    next_start = end - sum(seconds.values())
    kept = 1.0
    if updates := record.get("updates"):
      first, last = record["from_step"], record["step"]
      last = last if reached is None else min(last, reached)
      kept = min(max(last - first, 0) / updates, 1.0)
      reached = first if reached is None else min(first, reached)
    for stage, spent in seconds.items():
      if stage == "step":
        useful += kept * spent
        lost[_LOST_WORK] += (1 - kept) * spent
      else:
        lost[_CAUSES.get(stage, "other")] += spent
  return Goodput(useful, lost)
