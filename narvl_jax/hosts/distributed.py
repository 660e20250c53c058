"""Several processes: start-up, barriers and gathers.

A process is called a host, as on TPU pods, which run one on each. With one
process every function returns at once.
"""

import itertools
import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from narvl_jax.errors import list_few
from narvl_jax.hosts.cluster import Cluster
from narvl_jax.hosts.rendezvous import SECRET_VARIABLE, is_local, meet

BARRIER_SECONDS = 600.0
# Seconds without a heartbeat after which jax aborts every process. `Liveness`
# notices far earlier.
_JAX_HEARTBEAT_SECONDS = 3600

_BROKEN = re.compile(r"gloo.*(connection (closed|reset)|broken pipe)", re.I)

_host_names: list[str] = []
_barriers = itertools.count()


class HostsLost(RuntimeError):
  """Other hosts did not arrive at a barrier, or sent no heartbeat."""


def explain_lost(error: BaseException) -> str | None:
  """Returns one line about lost hosts; None if the error has another cause.

  On CPUs a host that dies during an update closes the Gloo connections that the
  others wait for.
  """
  text = " ".join(str(error).split())
  if isinstance(error, HostsLost):
    return text
  if not isinstance(error, jax.errors.JaxRuntimeError) or not _BROKEN.search(
    text
  ):
    return None
  return (
    "the connection to another host broke, whose process was killed or whose"
    f" machine or network failed ({text[:200]})"
  )


def initialize(
  cluster: Cluster, facts: Mapping[str, str], say: Callable[[str], None] = print
) -> None:
  """Connects the processes; call it before anything that touches a device.

  Raises:
    UserError: on every host, if one is missing or different.
  """
  secret = os.environ.get(SECRET_VARIABLE) or None
  _print_checklist(cluster, say)
  if secret is None:
    say(
      f"note: {SECRET_VARIABLE} is not set, so processes are accepted without"
      " proof that they belong to this run; set it to the same random text on"
      " all hosts where others can reach the coordinator's port"
    )
  _host_names[:] = meet(cluster, facts, say, secret)
  # It would take over SIGTERM, which `reliability.interrupt` handles.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    cluster.coordinator_address,
    cluster.num_processes,
    cluster.process_id,
    local_device_ids=cluster.local_device_ids,
    coordinator_bind_address=(
      cluster.coordinator_address
      if is_local(cluster.coordinator_address)
      else None
    ),
    cluster_detection_method="deactivate",
    initialization_timeout=cluster.start_timeout,
    heartbeat_timeout_seconds=_JAX_HEARTBEAT_SECONDS,
  )
  say(
    f"all {cluster.num_processes} processes are here, with the same config and"
    f" versions: {_shorten(_host_names)}"
  )


def _print_checklist(cluster: Cluster, say: Callable[[str], None]) -> None:
  count = cluster.num_processes
  address = cluster.coordinator_address
  say(
    f"process {cluster.process_id} of {count} on {socket.gethostname()} (from"
    f" {cluster.found_by}), coordinator {address}; waiting up to"
    f" {cluster.start_timeout} s for all. If this hangs, check that"
  )
  for line in (
    f"all {count} processes were started, each with its own --process_id"
    f" (0 to {count - 1}) and the same --num_processes={count}",
    f"all were given the coordinator {address}, which is where process 0 runs",
    f"port {address.rpartition(':')[2]} there is free, and open in the"
    " firewall",
  ):
    say(f"  - {line}")


def _shorten(names: Sequence[str]) -> str:
  counts = {name: names.count(name) for name in dict.fromkeys(names)}
  shown = [f"{n} ({k})" if k > 1 else n for n, k in counts.items()]
  return list_few(shown, 8)


def is_first() -> bool:
  """Returns whether this is process 0, which writes shared files."""
  return jax.process_index() == 0


def host_name(index: int) -> str:
  """Returns `host 3 (name)`."""
  name = _host_names[index] if index < len(_host_names) else "?"
  return f"host {index} ({name})"


def client() -> Any:
  """Returns jax's client of its coordination service; None if there is none."""
  # Not public; Orbax uses it too.
  from jax._src import distributed

  return distributed.global_state.client


def barrier(name: str, timeout: float = BARRIER_SECONDS) -> None:
  """Waits until all hosts have called it with the same name.

  Raises:
    HostsLost: some did not within `timeout` seconds.
  """
  if jax.process_count() == 1:
    return
  try:
    client().wait_at_barrier(
      f"narvl_jax {next(_barriers)} {name}", int(1000 * timeout)
    )
  except jax.errors.JaxRuntimeError as error:
    raise HostsLost(
      f'barrier "{name}" failed on {host_name(jax.process_index())} after at'
      f" most {timeout:g} s: {_who_is_missing(str(error))}"
    ) from error


def _who_is_missing(message: str) -> str:
  """Returns the hosts named in an error of the coordination service."""
  match = re.search(r"timed out task names:\s*((?:\S*\d+\s*)+)", message)
  numbers = re.findall(r"(\d+)\s", match.group(1) + " ") if match else []
  if not numbers:
    return " ".join(message.split())[:300]
  return ", ".join(host_name(int(n)) for n in numbers) + " did not arrive"


def gather_json(value: Any) -> list[Any]:
  """Returns the JSON values of all hosts, in order, on every host."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = np.ravel(multihost_utils.process_allgather(np.int32(data.size)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: data.size] = data
  rows = np.asarray(multihost_utils.process_allgather(padded))
  rows = rows.reshape(len(sizes), -1)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]
