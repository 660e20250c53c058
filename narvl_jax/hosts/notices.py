"""Notices between running hosts: failures, and steps to stop or trace at.

A thread polls the key-value store of jax's coordination service once a second,
so notices cost the training loop nothing.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self, TextIO

from narvl_jax.hosts.agreement import StopAgreement, TraceAgreement
from narvl_jax.hosts.cluster import Cluster
from narvl_jax.hosts.distributed import HostsLost, host_name
from narvl_jax.hosts.host_times import HostTimes
from narvl_jax.hosts.liveness import Liveness
from narvl_jax.terminal.text import escape, show

_POLL_SECONDS = 1.0
_PREFIX = "narvl_jax/notices"
# Seconds that a host waits at its end for the others to end too.
_FAREWELL_SECONDS = 5.0
# The same after a stop: the others may still write a checkpoint.
_LONG_FAREWELL_SECONDS = 60.0
# Seconds after which a host ends that cannot inform the others.
_TELLING_SECONDS = 15.0
_MAX_UNANSWERED = 5
# A host is lost after at least so many polls.
_SHORTEST_LOSS = 5.0


class Notices:
  """The thread that reads and writes the notices of one host.

  Attributes:
    host: index of this host.
    stop_signal: signal number of a stop request to any host, None before.
    agreement: used by the training loop.
    trace: where the hosts start the trace that one of them requests.
    times: seconds of the updates of all hosts.
    stage: returns the stage of this host; set by the caller.
  """

  def __init__(
    self,
    client: Any,
    cluster: Cluster,
    *,
    terminal: TextIO,
    poll_seconds: float = _POLL_SECONDS,
    leave: Callable[[int], Any] = os._exit,
    on_end: Callable[[int, str], Any] = lambda code, message: None,
    explain: Callable[[HostsLost], tuple[int, str]] = lambda e: (1, str(e)),
  ) -> None:
    """Prepares the thread.

    Args:
      client: client of jax's coordination service.
      cluster: the hosts; the limit of its heartbeats.
      poll_seconds: interval of the polls.
      leave: ends the process with an exit code, even if threads are running.
      on_end: called with exit code and message before the process ends.
      explain: lost host -> exit code and one line.
    """
    self._client = client
    self.host = cluster.process_id
    self._count = cluster.num_processes
    self._terminal = terminal
    self._poll_seconds = poll_seconds
    self._leave = leave
    self._on_end = on_end
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._published: set[str] = set()
    self._ending = threading.Lock()
    self._ended = threading.Event()
    self.stop_signal: int | None = None
    self.agreement = StopAgreement()
    self.trace = TraceAgreement(cluster.num_processes)
    self.times = HostTimes(cluster.num_processes)
    self.stage: Callable[[], str] = lambda: ""
    self._explain = explain
    self._liveness = Liveness(
      client,
      self.host,
      self._count,
      lost_seconds=max(
        cluster.heartbeat_timeout, _SHORTEST_LOSS * poll_seconds
      ),
      stage=lambda: self.stage(),
    )
    self._polls = 0
    self._second = threading.Thread(target=self._watch_polls, daemon=True)

  def __enter__(self) -> Self:
    self._thread.start()
    self._second.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
    self._thread.join()
    self._second.join()

  def fail(self, code: int, message: str) -> None:
    """Ends all processes with the same exit code; returns only if `leave` does.

    Args:
      code: exit code; 0 if nothing failed.
      message: one line for the terminal of every host.
    """
    self._closed.set()
    if not self._ending.acquire(blocking=False):
      # Another thread is already ending the process.
      self._ended.wait()
      self._leave(code)
      return
    # The key-value store rejects halves of surrogate pairs.
    message = escape(" ".join(message.split()))
    with contextlib.suppress(OSError, ValueError):
      text = f"{host_name(self.host)}: {message}"
      show(text, file=self._terminal)
    with self._at_most(_TELLING_SECONDS, code):
      self._publish(f"failure/{self.host}", f"{code} {message}")
    try:
      self._on_end(code, message)
    finally:
      # No other thread would end this process.
      self._depart(code)

  @property
  def ending(self) -> bool:
    """Whether a thread is ending this process."""
    return self._ending.locked()

  def poll(self) -> None:
    """Reads the notices of the others once and publishes new ones."""
    if self.stop_signal is not None:
      self._publish("stop", str(self.stop_signal))
    found = {
      key.removeprefix(f"{_PREFIX}/"): value
      for key, value in self._client.key_value_dir_get(_PREFIX)
    }
    for key, value in found.items():
      if key.startswith("failure/") and key != f"failure/{self.host}":
        self._follow(int(key.removeprefix("failure/")), value)
        return
    if "stop" in found:
      self.stop_signal = int(found["stop"])
      begun = self.agreement.request()
      if begun is not None:
        self._publish(f"step/{self.host}", str(begun))
    steps = [int(v) for key, v in found.items() if key.startswith("step/")]
    if len(steps) == self._count:
      self.agreement.agree(max(steps))
    for key, value in self.trace.exchange(found, self.host).items():
      self._publish(key, value)
    for key, value in self.times.exchange(found, self.host).items():
      self._client.key_value_set(
        f"{_PREFIX}/{key}", value, allow_overwrite=True
      )

  def _follow(self, host: int, value: str) -> None:
    """Ends this process because another one ends."""
    if not self._ending.acquire(blocking=False):
      return
    code, message = value.split(" ", 1)
    text = f"{host_name(host)}: {escape(message)}"
    for stream in dict.fromkeys((self._terminal, sys.stderr)):
      with contextlib.suppress(OSError, ValueError):
        show(text, file=stream)
    try:
      self._on_end(int(code), text)
    finally:
      self._depart(int(code))

  def _depart(self, code: int) -> None:
    """Ends this process when all others are about to end, or at a time limit.

    The first one to leave breaks the collectives of the others, which would
    then report an error.
    """
    farewell = _FAREWELL_SECONDS if code else _LONG_FAREWELL_SECONDS
    with self._at_most(farewell + _TELLING_SECONDS, code):
      self._publish(f"left/{self.host}", "")
      deadline = time.monotonic() + farewell
      while time.monotonic() < deadline:
        left = self._client.key_value_dir_get(f"{_PREFIX}/left")
        if len(left) == self._count:
          break
        time.sleep(self._poll_seconds / 5)
      if self.host == 0:
        # The store ends with the coordinator; the others must read it first.
        time.sleep(self._poll_seconds)
    self._ended.set()
    self._leave(code)

  @contextlib.contextmanager
  def _at_most(self, seconds: float, code: int) -> Iterator[None]:
    """Ends this process if requests to the coordinator hang in the block."""
    timer = threading.Timer(seconds, self._leave, args=[code])
    timer.daemon = True
    timer.start()
    try:
      yield
    except Exception as error:
      if not self._ended.is_set():
        text = " ".join(str(error).split())[:200]
        show(f"the other hosts cannot be reached: {text}", file=sys.stderr)
    finally:
      timer.cancel()

  def _watch(self) -> None:
    unanswered = 0
    while not self._closed.wait(self._poll_seconds):
      try:
        self.poll()
        # Not the elapsed time: the whole machine may have been busy.
        self._liveness.look(self._poll_seconds)
        self._polls += 1
        unanswered = 0
      except HostsLost as error:
        self.fail(*self._explain(error))
      except Exception as error:
        unanswered += 1
        if unanswered == _MAX_UNANSWERED and not self._closed.is_set():
          self._leave_unanswered(" ".join(str(error).split())[:200])

  def _watch_polls(self) -> None:
    """Ends this process if the coordinator never answers a request.

    For example if its machine lost power or its network failed.
    """
    seen, seconds = self._polls, 0.0
    while not self._closed.wait(self._poll_seconds):
      seconds += self._poll_seconds
      if self._polls != seen:
        seen, seconds = self._polls, 0.0
      if seconds > self._liveness.patience(self.stage()):
        self._leave_unanswered(f"nothing for {seconds:.0f} s")
        return

  def _leave_unanswered(self, why: str) -> None:
    if not self._ending.acquire(blocking=False):
      return  # Another thread ends the process, with its own message.
    with contextlib.suppress(OSError):
      show(
        f"{host_name(0)}, the coordinator, does not answer: {why}",
        file=self._terminal,
      )
    self._leave(1)

  def _publish(self, key: str, value: str) -> None:
    if key in self._published:
      return
    try:
      self._client.key_value_set(f"{_PREFIX}/{key}", value)
    except Exception as error:
      # Two hosts received a stop request: the first one counts.
      if "ALREADY_EXISTS" not in str(error):
        raise
    self._published.add(key)
