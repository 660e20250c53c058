"""Heartbeats with which hosts detect the loss of another host.

The heartbeats of jax's coordination service abort every process, even where a
machine that is busy compiling only sends one late. So jax's limit is set high
and this one is used instead.
"""

from collections.abc import Callable
from typing import Any

from narvl_jax.hosts.distributed import HostsLost, host_name

_PREFIX = "narvl_jax/alive"
# XLA's compiler may occupy all cores for minutes.
_PATIENT_FACTOR = 5.0
# Stages in which nothing is compiled.
_PROMPT_STAGES = ("step", "data_wait")
# Heartbeats within `lost_seconds`.
_SIGNS = 5.0


class Liveness:
  """Sends the heartbeats of one host and watches those of others.

  Host 0 watches all others, and they watch host 0. So each host costs the
  coordinator two requests an interval, however many hosts there are.
  """

  def __init__(
    self,
    client: Any,
    host: int,
    count: int,
    *,
    lost_seconds: float,
    stage: Callable[[], str],
  ) -> None:
    self._client = client
    self._host = host
    self._watched = range(1, count) if host == 0 else range(1)
    self._own, self._others = f"{_PREFIX}/others", f"{_PREFIX}/first"
    if host == 0:
      self._own, self._others = self._others, self._own
    self._interval = lost_seconds / _SIGNS
    self._lost_seconds = lost_seconds
    self._stage = stage
    self._since_sign = self._interval
    self._number = 0
    self._seen: dict[int, str] = {}
    self._silent = dict.fromkeys(self._watched, 0.0)

  def patience(self, stage: str) -> float:
    """Returns how long a host may be silent, in seconds."""
    factor = 1.0 if stage in _PROMPT_STAGES else _PATIENT_FACTOR
    return factor * self._lost_seconds

  def look(self, seconds: float) -> None:
    """Sends and checks heartbeats once per interval.

    Args:
      seconds: since the last call, without time in which this host could not
        run.

    Raises:
      HostsLost: a host is silent for too long.
    """
    self._since_sign += seconds
    for host in self._watched:
      self._silent[host] += seconds
    if self._since_sign < self._interval:
      return
    self._since_sign = 0.0
    self._number += 1
    self._client.key_value_set(
      f"{self._own}/{self._host}",
      f"{self._number} {self._stage()}",
      allow_overwrite=True,
    )
    for host, sign in self._signs().items():
      if host in self._silent and self._seen.get(host) != sign:
        self._seen[host] = sign
        self._silent[host] = 0.0
    self._check()

  def _signs(self) -> dict[int, str]:
    found = self._client.key_value_dir_get(self._others)
    return {int(key.rpartition("/")[2]): sign for key, sign in found}

  def _check(self) -> None:
    for host, seconds in self._silent.items():
      stage = self._seen.get(host, "").partition(" ")[2]
      if seconds > self.patience(stage):
        where = f' in phase "{stage}"' if stage else ""
        raise HostsLost(
          f"{host_name(host)} is lost: no sign of life for {seconds:.0f} s"
          f"{where}; its process was killed, or its machine or network failed"
          f" (--heartbeat_timeout={self._lost_seconds:g})"
        )
