"""The times of an update on all hosts, compared on the first one."""

import json
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from narvl_jax.hosts.distributed import host_name

# A host is named if it is slower than the median by more than this share of the
# time of an update.
NOTED_SHARE = 0.1
_UPDATE = "update"


class Comparison(NamedTuple):
  """Mean seconds of one kind in an update, over the hosts.

  Attributes:
    kind: such as "data wait".
    host: the slowest host.
    slowest: its seconds.
    median: of all hosts.
    update: seconds of a whole update, median of all hosts.
  """

  kind: str
  host: int
  slowest: float
  median: float
  update: float

  @property
  def noted(self) -> bool:
    """Whether the slowest host delays the others; see `NOTED_SHARE`."""
    return self.slowest - self.median > NOTED_SHARE * self.update

  def metrics(self) -> dict[str, float]:
    """Returns the figures by name."""
    prefix = f"hosts/{self.kind.replace(' ', '_')}"
    return {
      f"{prefix}_slowest": self.slowest,
      f"{prefix}_median": self.median,
      f"{prefix}_slowest_host": float(self.host),
    }

  def __str__(self) -> str:
    return (
      f"slowest host: {host_name(self.host)}, {self.kind}"
      f" {self.slowest:.3g} s an update, median {self.median:.3g} s"
    )


class HostTimes:
  """Exchanges sums of seconds through the notices, once per poll.

  Sums need no agreement about steps: each host is measured since the last
  comparison.
  """

  def __init__(self, num_hosts: int) -> None:
    self._num_hosts = num_hosts
    self._own = ""
    self._found: dict[int, dict[str, float]] = {}
    self._compared: dict[int, dict[str, float]] = {}

  def record(
    self, updates: int, seconds: float, kinds: Mapping[str, float]
  ) -> None:
    """Sets the sums of this host since its start.

    Args:
      updates: number of updates.
      seconds: their time.
      kinds: the time of each kind.
    """
    self._own = json.dumps({"updates": updates, _UPDATE: seconds, **kinds})

  def exchange(self, found: Mapping[str, str], host: int) -> dict[str, str]:
    """Reads the notices of all hosts; returns those to publish."""
    self._found = {
      int(key.removeprefix("times/")): json.loads(value)
      for key, value in found.items()
      if key.startswith("times/")
    }
    return {f"times/{host}": self._own} if self._own else {}

  def compare(self) -> list[Comparison]:
    """Returns a comparison per kind; empty before all hosts have new sums."""
    found = self._found
    rates = [self._rates(found, host) for host in range(self._num_hosts)]
    if not all(rates):
      return []
    self._compared = found
    update = statistics.median(rate[_UPDATE] for rate in rates)
    comparisons = []
    for kind in rates[0]:
      if kind != _UPDATE:
        values = [rate[kind] for rate in rates]
        slowest = max(values)
        comparisons.append(
          Comparison(
            kind,
            values.index(slowest),
            slowest,
            statistics.median(values),
            update,
          )
        )
    return comparisons

  def _rates(
    self, found: Mapping[int, Mapping[str, float]], host: int
  ) -> dict[str, float]:
    """Returns mean seconds of an update since the last comparison."""
    now, before = found.get(host, {}), self._compared.get(host, {})
    updates = now.get("updates", 0) - before.get("updates", 0)
    if updates <= 0:
      return {}
    return {
      kind: (total - before.get(kind, 0.0)) / updates
      for kind, total in now.items()
      if kind != "updates"
    }
