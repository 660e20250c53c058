"""Flags and detection of a cluster; barriers and values without one."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax._src import clusters

from narvl_jax.errors import UserError
from narvl_jax.hosts import cluster, distributed
from narvl_jax.hosts.cluster import Cluster


def _settings(**changes: Any) -> Any:
  usual = {
    "coordinator_address": None,
    "num_processes": None,
    "process_id": None,
    "start_timeout": 300,
    "heartbeat_timeout": 60,
    "distributed": "auto",
  }
  return SimpleNamespace(**(usual | changes))


_BY_HAND = {
  "coordinator_address": "10.0.0.1:8476",
  "num_processes": 4,
  "process_id": 3,
}
_SLURM = {
  "SLURM_JOB_ID": "5",
  "SLURM_STEP_NODELIST": "node[003-004]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}


def test_nothing_is_detected_on_one_machine(monkeypatch):
  # Nothing outside is asked, so that a start is as fast as without.
  monkeypatch.setattr("socket.create_connection", None)
  monkeypatch.setattr("socket.getaddrinfo", None)
  assert cluster.detect(_settings()) is None


def test_flags_make_a_cluster():
  found = cluster.detect(_settings(**_BY_HAND, start_timeout=7))
  assert found == Cluster("10.0.0.1:8476", 4, 3, start_timeout=7)


def test_slurm_is_detected(monkeypatch):
  for name, value in _SLURM.items():
    monkeypatch.setenv(name, value)
  found = cluster.detect(_settings(heartbeat_timeout=9))
  assert found == Cluster(
    "node003:61445",
    2,
    1,
    [0],
    heartbeat_timeout=9,
    found_by="the environment",
  )
  # Flags count for more.
  assert cluster.detect(_settings(**_BY_HAND)) == Cluster("10.0.0.1:8476", 4, 3)
  assert cluster.detect(_settings(distributed="off")) is None


@pytest.mark.parametrize(
  ("nodes", "first"),
  [("rack[1-2]-gpu[1-4]", "rack1-gpu1"), ("node[7]", "node7"), ("a,b", "a")],
)
def test_the_coordinator_is_the_first_node_of_slurm(monkeypatch, nodes, first):
  for name, value in {**_SLURM, "SLURM_STEP_NODELIST": nodes}.items():
    monkeypatch.setenv(name, value)
  found = cluster.detect(_settings())
  assert found is not None
  assert found.coordinator_address == f"{first}:61445"
  monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
  found = cluster.detect(_settings())
  assert found is not None
  assert found.coordinator_address == f"{first}:1234"
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "chosen:1")
  found = cluster.detect(_settings())
  assert found is not None
  assert found.coordinator_address == "chosen:1"


def test_a_list_of_nodes_that_cannot_be_read(monkeypatch):
  for name, value in {**_SLURM, "SLURM_STEP_NODELIST": "a[3-1]"}.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=r'"3-1" runs backwards; set --coordi'):
    cluster.detect(_settings())


def test_one_slurm_task_is_no_cluster(monkeypatch):
  for name, value in {**_SLURM, "SLURM_NTASKS": "1"}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("SLURM_PROCID", "0")
  assert cluster.detect(_settings()) is None
  found = cluster.detect(_settings(distributed="on"))
  assert found is not None
  assert found.num_processes == 1


def test_tpu_pod_on_gke_is_detected(monkeypatch):
  from jax._src.clusters import cloud_tpu_cluster

  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(clusters.cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,other")
  monkeypatch.setenv("TPU_WORKER_ID", "1")
  # A variable that is absent is else looked up in the metadata.
  monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", lambda _: None)
  found = cluster.detect(_settings())
  assert found is not None
  assert found.coordinator_address.startswith("localhost:")
  assert found[1:4] == (2, 1, None)


def test_a_cluster_that_cannot_be_read(monkeypatch):
  def fail(*_: Any) -> None:
    raise RuntimeError("no such node")

  monkeypatch.setattr(
    clusters.ClusterEnv, "auto_detect_unset_distributed_params", fail
  )
  with pytest.raises(UserError, match=r"cannot read it \(no such node\); set"):
    cluster.detect(_settings())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"num_processes": 2},
      r"--num_processes=2 without --coordinator_address and --process_id: ",
    ),
    (
      {"coordinator_address": "h:1", "process_id": 0},
      r"--coordinator_address=h:1, --process_id=0 without --num_processes: ",
    ),
    (
      _BY_HAND | {"process_id": 4},
      r"--process_id=4 is not one of 0 to 3 .*valid: --process_id=3$",
    ),
    (_BY_HAND | {"process_id": -1}, r"nearest valid: --process_id=0$"),
    (_BY_HAND | {"num_processes": 0}, r"--num_processes=0 is below 1"),
    (
      _BY_HAND | {"coordinator_address": "host"},
      r'"host" is not HOST:PORT .* --coordinator_address=host:8476$',
    ),
    (_BY_HAND | {"coordinator_address": "h:99999"}, r'"h:99999" is not HOST'),
    (_BY_HAND | {"coordinator_address": "h:ssh"}, r'"h:ssh" is not HOST:PORT'),
    (_BY_HAND | {"coordinator_address": ":80"}, r'":80" is not HOST:PORT'),
    (
      _BY_HAND | {"distributed": "off"},
      r"--distributed=off contradicts --coordinator_address=10.0.0.1:8476",
    ),
    ({"distributed": "on"}, r"--distributed=on, but jax finds no cluster"),
    ({"start_timeout": 0}, r"--start_timeout=0 is below 1 s; .*_timeout=1$"),
    ({"heartbeat_timeout": -3}, r"--heartbeat_timeout=-3 is below 1 s"),
  ],
)
def test_bad_flags(changes, message):
  with pytest.raises(UserError, match=message) as error:
    cluster.detect(_settings(**changes))
  assert "\n" not in str(error.value)


def test_one_process_waits_for_nobody():
  distributed.barrier("alone", timeout=0)
  assert distributed.is_first()
  assert distributed.gather_json({"a": [1, None]}) == [{"a": [1, None]}]


@pytest.mark.parametrize(
  ("text", "found"),
  [
    (
      "UNKNOWN: Gloo all-reduce failed: [external/gloo/transport/tcp/pair.cc]"
      " Connection closed by peer [127.0.0.1]:1234",
      "the connection to another host broke, whose process was killed or",
    ),
    ("INVALID_ARGUMENT: Gloo all-reduce: wrong type", None),
    ("RESOURCE_EXHAUSTED: out of memory", None),
  ],
)
def test_a_broken_connection_is_a_lost_host(text, found):
  explained = distributed.explain_lost(jax.errors.JaxRuntimeError(text))
  assert (explained or "").startswith(found or "")
  assert bool(explained) == bool(found)
  assert distributed.explain_lost(ValueError(text)) is None
  lost = distributed.HostsLost("host 1 is lost")
  assert distributed.explain_lost(lost) == "host 1 is lost"


class Unanswered:
  def __init__(self) -> None:
    self.names: list[str] = []

  def wait_at_barrier(self, name: str, timeout: int) -> None:
    assert timeout == 2500
    self.names.append(name)
    # Messages of the service of jax 0.10.2.
    raise jax.errors.JaxRuntimeError(
      "DEADLINE_EXCEEDED: Barrier timed out. Id: b::0. This usually happens"
      " because a task triggered the barrier too early.\n# of tasks that"
      " reached the barrier: 1/3.\nThe first task at the barrier: 0. Some timed"
      " out task names:\n1\n12\n\nRPC: /xla.coordination.CoordinationService/"
      "Barrier [type.googleapis.com/x='']"
    )


def test_a_barrier_names_who_is_missing(monkeypatch):
  service = Unanswered()
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(distributed, "client", lambda: service)
  monkeypatch.setattr(distributed, "_host_names", ["a", "b"])
  for _ in range(2):
    with pytest.raises(
      distributed.HostsLost,
      match=r'barrier "run folder" failed on host 0 \(a\) after at most 2.5 s:'
      r" host 1 \(b\), host 12 \(\?\) did not arrive$",
    ):
      distributed.barrier("run folder", timeout=2.5)
  # The service takes each name once.
  assert len(set(service.names)) == 2
