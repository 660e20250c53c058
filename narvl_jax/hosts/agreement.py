"""Agreements of hosts: where all of them stop, or start a trace."""

import threading
from collections.abc import Mapping

from narvl_jax.hosts.distributed import HostsLost

# A host may be in the middle of an evaluation.
_AGREEMENT_SECONDS = 1800.0


class StopAgreement:
  """Makes all hosts stop after the same piece of work.

  A piece is the work between two calls of `due`: a step, or a batch of an
  evaluation, in the same order on all hosts. Hosts run ahead of each other.
  After a stop request each host publishes the piece it has begun and begins no
  other before all have done so; all then stop after the latest of them.
  """

  def __init__(self, *, what: str = "stop", begun: int = 0) -> None:
    self._what = what
    self._lock = threading.Lock()
    self._begun = begun
    self._requested = False
    self._last: int | None = None
    self._agreed = threading.Event()

  def begin(self) -> None:
    """Marks the start of the first piece of work."""
    with self._lock:
      self._begun = 1

  def due(self, timeout: float = _AGREEMENT_SECONDS) -> bool:
    """Returns whether all hosts stop here; otherwise the next piece may begin.

    Raises:
      HostsLost: the others did not publish their progress in time.
    """
    with self._lock:
      done = self._begun
      if not self._requested:
        self._begun += 1
        return False
    if not self._agreed.wait(timeout):
      raise HostsLost(
        f"{self._what} requested: not all hosts reported within {timeout:g} s"
        " how far they are"
      )
    assert self._last is not None
    with self._lock:
      if done < self._last:
        self._begun += 1
    return done >= self._last

  def request(self) -> int | None:
    """Requests a stop; returns the piece begun last, None before the first."""
    with self._lock:
      self._requested = self._begun > 0
      return self._begun or None

  def agree(self, last: int) -> None:
    """Sets the piece of work after which all stop."""
    self._last = last
    self._agreed.set()


class TraceAgreement:
  """Makes all hosts trace the same updates, as often as one is asked to.

  Every request has its own `StopAgreement`, about the updates since the one
  before.
  """

  def __init__(self, num_hosts: int = 1) -> None:
    self._num_hosts = num_hosts
    self._wanted: int | None = None
    self._updates: int | None = None
    self._start_round(0)

  def request(self, updates: int) -> None:
    """Requests a trace of the next updates; from any thread of any host."""
    self._wanted = updates

  def due(self) -> int | None:
    """Returns how many updates to trace from here on; None for no trace.

    Call it before every update. Several hosts receive the same result.

    Raises:
      HostsLost: see `StopAgreement.due`.
    """
    if self._num_hosts == 1:
      updates, self._wanted = self._wanted, None
      return updates
    number, agreement = self._round
    if not agreement.due():
      return None
    updates, self._wanted = self._updates, None
    self._start_round(number + 1)
    return updates

  def exchange(self, found: Mapping[str, str], host: int) -> dict[str, str]:
    """Reads the notices of all hosts; returns those to publish."""
    number, agreement = self._round
    key, own = f"trace/{number}", {}
    if self._wanted is not None:
      own[key] = str(self._wanted)
    if key in found:
      self._updates = int(found[key])
      own[f"{key}/{host}"] = str(agreement.request())
    begun = [int(v) for k, v in found.items() if k.startswith(f"{key}/")]
    if len(begun) == self._num_hosts:
      agreement.agree(max(begun))
    return own

  def _start_round(self, number: int) -> None:
    # One assignment: another thread reads it.
    self._round = number, StopAgreement(what="trace", begun=1)
