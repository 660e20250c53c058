"""The description of one key of a config."""

import dataclasses
import math
from typing import Any, Literal

# "resume": a resumed run may have another value. "report": the value
# changes no prediction of a trained model, so read-only commands report a
# difference from the checkpoint and continue.
Change = Literal["", "resume", "report"]


@dataclasses.dataclass(frozen=True)
class Setting:
  """One setting.

  Attributes:
    default: its value unless a config sets another.
    help: one line.
    low: lowest valid value; None: not checked here.
    high: highest valid value; None: no limit.
    choices: the valid values; () for any.
    change: see `Change`.
    kind: type of a value where the default is None. None means the value of
      the named model size, which also checks the range.
  """

  default: Any
  help: str
  low: float | None = None
  high: float | None = None
  choices: tuple[str, ...] = ()
  change: Change = ""
  kind: type | None = None

  def limits(self) -> str:
    """Returns the valid values in words, "" if any value is valid."""
    if self.choices:
      return ", ".join(self.choices)
    if self.low is None:
      return ""
    most = "" if self.high is None else f", at most {self.high}"
    return f"at least {self.low}{most}"

  def nearest(self, value: float) -> float | None:
    """Returns the valid number that is nearest, None if `value` is valid."""
    assert self.low is not None
    top = math.inf if self.high is None else self.high
    if self.low <= value <= top and math.isfinite(value):
      return None
    above = self.high is not None and value > self.high
    return self.high if above else self.low
