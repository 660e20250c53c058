"""Notices between hosts: failures, and the step after which all stop."""

import errno
import io
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from narvl_jax.hosts import notices as notices_lib
from narvl_jax.hosts.agreement import StopAgreement
from narvl_jax.hosts.cluster import Cluster
from narvl_jax.hosts.distributed import HostsLost
from narvl_jax.hosts.notices import Notices


class Store:
  """The key-value store of the coordination service."""

  def __init__(self) -> None:
    self.values: dict[str, str] = {}
    self.down = False

  def key_value_set(
    self, key: str, value: str, allow_overwrite: bool = False
  ) -> None:
    if key in self.values and not allow_overwrite:
      raise RuntimeError(f"ALREADY_EXISTS: key {key}")
    self.values[key] = value

  def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
    if self.down:
      raise RuntimeError("UNAVAILABLE: connection refused")
    return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]


def _hosts(count: int) -> tuple[Store, list[Any], list[tuple[int, int]]]:
  """Returns store, notices by host, and (host, code) of those that left."""
  store, left = Store(), []

  def leaving(host: int) -> Any:
    return lambda code: left.append((host, code))

  notices = [
    Notices(
      store,
      Cluster("127.0.0.1:1", count, i),
      terminal=io.StringIO(),
      poll_seconds=0.01,
      leave=leaving(i),
    )
    for i in range(count)
  ]
  return store, notices, left


def _poll(notices: list[Any], times: int = 3) -> None:
  for _ in range(times):
    for own in notices:
      own.poll()


def test_all_stop_after_the_step_of_the_fastest():
  _, notices, _ = _hosts(3)
  agreements = [own.agreement for own in notices]
  for agreement, ahead in zip(agreements, (5, 7, 6), strict=True):
    agreement.begin()
    for _ in range(1, ahead):
      assert not agreement.due()
  notices[0].stop_signal = 15
  _poll(notices)
  assert [own.stop_signal for own in notices] == [15] * 3
  # Each had begun one step more than it was asked about.
  for agreement, ahead in zip(agreements, (5, 7, 6), strict=True):
    due = [agreement.due() for _ in range(ahead, 8)]
    assert due == [False] * (7 - ahead) + [True]


def test_hosts_that_only_begin_are_waited_for():
  _, notices, _ = _hosts(2)
  notices[1].stop_signal = 2
  notices[1].agreement.begin()
  _poll(notices)
  with pytest.raises(HostsLost, match=r"stop requested: not all hosts .* 0 s"):
    notices[1].agreement.due(timeout=0)
  notices[0].agreement.begin()
  _poll(notices)
  assert notices[0].agreement.due()
  assert notices[1].agreement.due()


def test_two_hosts_receive_a_signal_at_once():
  store, notices, _ = _hosts(2)
  for own, number in zip(notices, (15, 2), strict=True):
    own.agreement.begin()
    own.stop_signal = number
  _poll(notices)
  # The first one's word counts on both: exit codes are equal.
  assert [own.stop_signal for own in notices] == [15, 15]
  assert all(own.agreement.due() for own in notices)
  assert store.values["narvl_jax/notices/stop"] == "15"


@pytest.mark.parametrize("seed", range(5))
def test_hosts_that_wait_for_each_other_do_not_hang(seed):
  """Each may be two steps ahead of the slowest, as devices allow."""
  _, notices, _ = _hosts(3)
  done = [0] * 3
  ended = {}
  changed = threading.Condition()

  def train(host: int) -> None:
    agreement = notices[host].agreement
    agreement.begin()
    for step in range(1, 10_000):
      with changed:
        assert changed.wait_for(lambda: min(done) >= step - 3, 20)  # noqa: B023
        done[host] = step
        changed.notify_all()
      if (host, step) == (seed % 3, 20 + seed):
        notices[host].stop_signal = 15
      if agreement.due(timeout=20):
        ended[host] = step
        return

  threads = [threading.Thread(target=train, args=(i,)) for i in range(3)]
  for own in notices:
    own.__enter__()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for own in notices:
    own.__exit__()
  assert len(set(ended.values())) == 1
  assert len(ended) == 3


@pytest.mark.parametrize("asking", [(0,), (2,), (0, 1)])
def test_all_trace_the_same_updates(asking):
  """Twice, as hosts run ahead of each other."""
  _, notices, _ = _hosts(3)
  due: list[list[Any]] = [[], [], []]
  for host, ahead in enumerate((5, 7, 6)):
    due[host] += [notices[host].trace.due() for _ in range(ahead)]
  for updates, last in ((4, 10), (9, 20)):
    for host in asking:
      notices[host].trace.request(updates)
    _poll(notices)
    for host, seen in enumerate(due):
      seen += [notices[host].trace.due() for _ in range(last - len(seen))]
  assert due[0] == due[1] == due[2]
  assert {x: i for i, x in enumerate(due[0]) if x} == {4: 7, 9: 10}


def test_a_trace_waits_for_the_progress_of_all():
  _, notices, _ = _hosts(2)
  notices[0].trace.request(3)
  notices[0].poll()
  notices[0].poll()
  agreement = notices[0].trace._round[1]
  with pytest.raises(HostsLost, match="trace requested: not all hosts"):
    agreement.due(timeout=0)


def test_a_failure_ends_all_with_its_code():
  _, notices, left = _hosts(3)
  with notices[0], notices[2]:
    notices[1].fail(2, "error: no such\nsource")
    deadline = time.monotonic() + 20
    while len(left) < 3 and time.monotonic() < deadline:
      time.sleep(0.01)
  assert {*left} == {(0, 2), (1, 2), (2, 2)}
  for host in (0, 2):
    text = notices[host]._terminal.getvalue()
    assert text.startswith("host 1 (?): error: no such source\n")


def test_the_coordinator_leaves_last():
  _, notices, left = _hosts(3)
  with notices[1], notices[2]:
    notices[0].fail(1, "failed")
  assert left[-1] == (0, 1)
  assert {host for host, _ in left} == {0, 1, 2}


def _wait(condition: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_nobody_leaves_before_all_are_ready():
  """A host that has ended breaks the collectives of the others."""
  store, notices, left = _hosts(3)
  ready = threading.Event()
  reported = []

  def finish(code: int, message: str) -> None:
    reported.append((code, message))
    # A checkpoint on its way to the disk.
    ready.wait(20)

  notices[2]._on_end = finish
  with notices[0], notices[2]:
    stopped = threading.Thread(
      target=notices[1].fail, args=(0, "SIGTERM: stopped")
    )
    stopped.start()
    words = {f"narvl_jax/notices/left/{host}" for host in (0, 1)}
    _wait(lambda: words <= {*store.values})
    assert left == []
    ready.set()
    stopped.join()
    _wait(lambda: len(left) == 3)
  assert {*left} == {(0, 0), (1, 0), (2, 0)}
  assert left[-1] == (0, 0)
  assert reported == [(0, "host 1 (?): SIGTERM: stopped")]


def test_a_host_that_cannot_publish_the_reason_ends_anyway(monkeypatch):
  """No terminal, and the callback at the end fails."""
  monkeypatch.setattr(notices_lib, "_FAREWELL_SECONDS", 0.1)
  _, notices, left = _hosts(2)

  def fail(*_: Any, **__: Any) -> None:
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")

  for own in notices:
    own._terminal.write = fail
    own._on_end = fail
  with pytest.raises(BrokenPipeError):
    notices[0].fail(2, "error: no disk")
  with pytest.raises(BrokenPipeError):
    notices[1].poll()
  assert left == [(0, 2), (1, 2)]


def test_a_coordinator_that_hangs_is_not_waited_for(monkeypatch):
  store, notices, left = _hosts(2)
  release = threading.Event()
  for name in ("_TELLING_SECONDS", "_FAREWELL_SECONDS"):
    monkeypatch.setattr(notices_lib, name, 0.1)
  monkeypatch.setattr(store, "key_value_set", lambda *_, **__: release.wait(20))
  ending = threading.Thread(target=notices[1].fail, args=(75, "watchdog"))
  ending.start()
  _wait(lambda: left == [(1, 75)])
  release.set()
  ending.join()


def test_a_second_failure_of_a_host_is_ignored():
  store, notices, left = _hosts(1)
  notices[0].fail(0, "SIGTERM: stopped")
  notices[0].fail(1, "failed: a connection was reset")
  assert store.values["narvl_jax/notices/failure/0"] == "0 SIGTERM: stopped"
  assert "reset" not in notices[0]._terminal.getvalue()
  assert left[0] == (0, 0)


def test_a_lost_coordinator_ends_the_others():
  store, notices, left = _hosts(2)
  store.down = True
  with notices[1]:
    deadline = time.monotonic() + 20
    while not left and time.monotonic() < deadline:
      time.sleep(0.01)
  assert left[0] == (1, 1)
  assert "host 0 (?), the coordinator, does not answer: UNAVAILABLE" in (
    notices[1]._terminal.getvalue()
  )


def test_no_stop_without_a_request():
  agreement = StopAgreement()
  agreement.begin()
  assert not any(agreement.due(timeout=0) for _ in range(1, 50))
