"""Which host is lost, and which is only busy."""

import io
import threading
from typing import Any

import pytest

from narvl_jax.hosts import cluster as cluster_lib
from narvl_jax.hosts import distributed
from narvl_jax.hosts.distributed import HostsLost
from narvl_jax.hosts.liveness import Liveness
from narvl_jax.hosts.notices import Notices
from tests.hosts.test_notices import Store


def _hosts(count: int, stage: str = "step") -> tuple[Store, list[Liveness]]:
  store = Store()
  hosts = [
    Liveness(store, i, count, lost_seconds=10.0, stage=lambda: stage)
    for i in range(count)
  ]
  return store, hosts


def _look(hosts: list[Liveness], times: int) -> None:
  for _ in range(times):
    for host in hosts:
      host.look(1.0)


def test_hosts_that_give_signs_are_alive() -> None:
  _, hosts = _hosts(3)
  _look(hosts, 100)


@pytest.mark.parametrize(("stage", "seconds"), [("step", 10), ("compile", 50)])
def test_a_host_without_a_sign_is_lost(stage: str, seconds: int) -> None:
  _, hosts = _hosts(3, stage)
  _look(hosts, 7)
  # Signs are given and looked at every two seconds.
  _look(hosts[:2], seconds - 2)
  with pytest.raises(
    HostsLost,
    match=rf"host 2 \(\?\) is lost: no sign of life for {seconds + 2} s"
    rf' in phase "{stage}".*--heartbeat_timeout=10\)',
  ):
    _look(hosts[:2], 6)


def test_the_others_watch_the_first_host_only() -> None:
  _, hosts = _hosts(3)
  _look(hosts, 7)
  _look(hosts[1:2], 8)
  with pytest.raises(HostsLost, match=r"host 0 \(\?\) is lost"):
    _look(hosts[1:2], 6)


def test_a_host_that_never_came_is_lost() -> None:
  _, hosts = _hosts(2)
  with pytest.raises(HostsLost, match=r"host 1 \(\?\) is lost"):
    _look(hosts[:1], 60)


def test_the_cost_does_not_grow_with_the_hosts() -> None:
  store, hosts = _hosts(200)
  asked: list[str] = []
  whole = store.key_value_dir_get
  store.key_value_dir_get = lambda prefix: asked.append(prefix) or whole(prefix)
  _look(hosts, 2)
  assert asked.count("narvl_jax/alive/others") == 1
  assert len(store.key_value_dir_get("narvl_jax/alive/first")) == 1


def _notices(store: Any, host: int, left: list[tuple[int, int]]) -> Any:
  return Notices(
    store,
    cluster_lib.Cluster("127.0.0.1:1", 2, host, heartbeat_timeout=0.5),
    terminal=io.StringIO(),
    poll_seconds=0.01,
    leave=lambda code: left.append((host, code)),
  )


def test_a_lost_host_ends_the_others_in_one_line(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr("narvl_jax.hosts.notices._FAREWELL_SECONDS", 0.1)
  left: list[tuple[int, int]] = []
  first = _notices(Store(), 0, left)
  first.stage = lambda: "step"
  with first:
    first._thread.join(20)
  assert left[0] == (0, 1)
  (line,) = first._terminal.getvalue().splitlines()
  assert line.startswith("host 0 (?): host 1 (?) is lost: no sign of life for ")


def test_a_coordinator_that_never_answers_ends_the_others() -> None:
  release = threading.Event()
  store: Any = Store()
  store.key_value_dir_get = lambda _: release.wait(20) and []
  left: list[tuple[int, int]] = []
  other = _notices(store, 1, left)
  other.stage = lambda: "step"
  with other:
    other._second.join(20)
    release.set()
  assert left == [(1, 1)]
  (line,) = other._terminal.getvalue().splitlines()
  assert "host 0 (?), the coordinator, does not answer: nothing for" in line


def test_a_process_that_is_ending_prints_no_second_message() -> None:
  left: list[tuple[int, int]] = []
  other = _notices(Store(), 1, left)
  other._ending.acquire()
  other._leave_unanswered("nothing for 9 s")
  assert (other._terminal.getvalue(), left) == ("", [])


def test_jax_does_not_abort_before(monkeypatch: pytest.MonkeyPatch) -> None:
  given: dict[str, Any] = {}
  monkeypatch.setattr(distributed, "_host_names", [])
  monkeypatch.setattr(distributed, "meet", lambda *_, **__: ["a"])
  monkeypatch.setattr(
    "jax.distributed.initialize", lambda *_, **more: given.update(more)
  )
  cluster = cluster_lib.Cluster("127.0.0.1:1", 1, 0, heartbeat_timeout=5)
  distributed.initialize(cluster, {}, lambda _: None)
  assert given["heartbeat_timeout_seconds"] >= 3600
