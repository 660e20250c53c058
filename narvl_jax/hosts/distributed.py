"""Several processes as one: start-up, barriers, and answers in one place.

A process is called a host here, as on TPU pods, which have one on each. With
one process every function returns at once.
"""

import itertools
import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from narvl_jax.errors import UserError
from narvl_jax.hosts.differences import describe_differences
from narvl_jax.hosts.rendezvous import SECRET_VARIABLE, is_local, meet
from narvl_jax.hosts.slurm import expand_nodes

# --help of a command shows only flags of its own, which these are to be.
flags.disclaim_key_flags()

# Long enough for the slowest file system, short enough not to waste a night.
BARRIER_SECONDS = 600.0
HEARTBEAT_SECONDS = 60
# jax aborts every process when one gives it no sign for so long. `Liveness`
# notices far earlier, and in one line.
_JAX_HEARTBEAT_SECONDS = 3600
_MODES = ("auto", "on", "off")
_FLAGS = ("coordinator_address", "num_processes", "process_id")

_BROKEN = re.compile(r"gloo.*(connection (closed|reset)|broken pipe)", re.I)

_host_names: list[str] = []
_barriers = itertools.count()


class Cluster(NamedTuple):
  """The processes that belong together, and which one this is.

  Attributes:
    coordinator_address: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: which one this is.
    local_device_ids: the devices of this machine that are its own; None: all.
    start_timeout: seconds to wait for the others.
    heartbeat_timeout: seconds without a sign of life after which a process
      counts as lost.
    found_by: the flags, or the cluster that jax found.
  """

  coordinator_address: str
  num_processes: int
  process_id: int
  local_device_ids: Sequence[int] | None = None
  start_timeout: int = 300
  heartbeat_timeout: int = HEARTBEAT_SECONDS
  found_by: str = "flags"


class HostsLost(RuntimeError):
  """Other hosts did not come to where they should be."""


def explain_lost(error: BaseException) -> str | None:
  """Returns one line about hosts that are gone, None if that is no cause.

  On CPUs a host that dies in the middle of an update closes the connections
  that the others wait at.
  """
  if isinstance(error, HostsLost):
    return " ".join(str(error).split())
  text = " ".join(str(error).split())
  if not isinstance(error, jax.errors.JaxRuntimeError) or not _BROKEN.search(
    text
  ):
    return None
  return (
    "the connection to another host broke, whose process was killed or whose"
    f" machine or network failed ({text[:200]})"
  )


def define_flags() -> None:
  """Defines the flags of a command that runs in several processes."""
  flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, the same for all."
  )
  flags.DEFINE_integer("num_processes", None, "Number of processes.")
  flags.DEFINE_integer("process_id", None, "Which process this is, from 0.")
  flags.DEFINE_integer(
    "start_timeout", 300, "Seconds to wait for all processes at the start."
  )
  flags.DEFINE_integer(
    "heartbeat_timeout",
    HEARTBEAT_SECONDS,
    "Seconds after which a silent process is lost; five times as many where"
    " it may be compiling.",
  )
  flags.DEFINE_enum(
    "distributed",
    "auto",
    _MODES,
    "Several processes: on, off, or auto: with the three flags above, or on"
    " SLURM, GKE and Cloud TPU.",
  )


def detect(settings: Any) -> Cluster | None:
  """Returns the cluster that flags or the environment name, None for none.

  Args:
    settings: has the flags as attributes.

  Raises:
    UserError: flags are missing, contradict each other or make no sense.
  """
  for name in ("start_timeout", "heartbeat_timeout"):
    if getattr(settings, name) < 1:
      raise UserError(
        f"--{name}={getattr(settings, name)} is below 1 s; nearest valid:"
        f" --{name}=1"
      )
  given = {
    name: value
    for name in _FLAGS
    if (value := getattr(settings, name)) is not None
  }
  if settings.distributed == "off":
    if given:
      raise UserError(
        f"--distributed=off contradicts --{next(iter(given))}="
        f"{next(iter(given.values()))}; drop one of them"
      )
    return None
  if given:
    found = _from_flags(given)
  else:
    found = _from_environment(settings.start_timeout)
    if found is None and settings.distributed == "on":
      raise UserError(
        "--distributed=on, but jax finds no cluster (SLURM, GKE, Cloud TPU)"
        " here; set --coordinator_address, --num_processes and --process_id"
      )
  if found is None or (
    found.num_processes == 1 and settings.distributed == "auto"
  ):
    return None
  return found._replace(
    start_timeout=settings.start_timeout,
    heartbeat_timeout=settings.heartbeat_timeout,
  )


def _from_flags(given: Mapping[str, Any]) -> Cluster:
  missing = [f"--{name}" for name in _FLAGS if name not in given]
  if missing:
    shown = ", ".join(f"--{name}={value}" for name, value in given.items())
    raise UserError(
      f"{shown} without {' and '.join(missing)}: a start by hand needs all of"
      " --coordinator_address, --num_processes and --process_id"
    )
  address, count, index = (given[name] for name in _FLAGS)
  if count < 1:
    raise UserError(
      f"--num_processes={count} is below 1; nearest valid: --num_processes=1"
    )
  if not 0 <= index < count:
    near = min(max(index, 0), count - 1)
    raise UserError(
      f"--process_id={index} is not one of 0 to {count - 1}"
      f" (--num_processes={count}); nearest valid: --process_id={near}"
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(
      f'--coordinator_address="{address}" is not HOST:PORT with a port of 1 to'
      f" 65535; such as --coordinator_address={host or address}:8476"
    )
  return Cluster(address, count, index)


def _from_environment(timeout: int) -> Cluster | None:
  """Asks jax's own detection, which looks at variables first."""
  # Not public; what is public cannot be asked without starting something.
  from jax._src import clusters

  try:
    address, count, index, devices = (
      clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"),
        None,
        None,
        None,
        None,
        timeout,
      )
    )
  except (RuntimeError, ValueError, KeyError, OSError) as error:
    raise UserError(
      f"jax found a cluster but cannot read it ({error}); set"
      " --coordinator_address, --num_processes and --process_id, or"
      " --distributed=off"
    ) from error
  if address is None or count is None or index is None:
    return None
  address = _first_slurm_node(address)
  return Cluster(address, count, index, devices, found_by="the environment")


def _first_slurm_node(address: str) -> str:
  """Returns the coordinator's address with the first node of a SLURM job.

  jax reads lists up to their first bracket only.
  """
  from jax._src.clusters.slurm_cluster import SlurmCluster

  port = os.environ.get("JAX_COORDINATOR_PORT")
  if not SlurmCluster.is_env_present() or address != (
    SlurmCluster.get_coordinator_address(None, port)
  ):
    return address
  nodes = os.environ["SLURM_STEP_NODELIST"]
  try:
    return f"{expand_nodes(nodes)[0]}:{address.rpartition(':')[2]}"
  except ValueError as error:
    raise UserError(
      f"SLURM_STEP_NODELIST cannot be read: {error}; set"
      " --coordinator_address, --num_processes and --process_id"
    ) from error


def initialize(
  cluster: Cluster,
  facts: Mapping[str, str],
  say: Callable[[str], None] = print,
) -> None:
  """Connects the processes, after which jax sees the devices of all.

  Must come before anything that touches a device.

  Args:
    cluster: from `detect`.
    facts: what must be the same on all hosts, see `describe_differences`.
    say: prints a line.

  Raises:
    UserError: on every host: one is missing, or not the same.
  """
  secret = os.environ.get(SECRET_VARIABLE) or None
  _print_checklist(cluster, say)
  if secret is None:
    say(
      f"note: {SECRET_VARIABLE} is not set, so processes are believed without"
      " proof that they belong to this run; set it to the same random text on"
      " all hosts where others can reach the coordinator's port"
    )
  _host_names[:] = meet(
    cluster.coordinator_address,
    cluster.num_processes,
    cluster.process_id,
    facts,
    timeout=cluster.start_timeout,
    compare=describe_differences,
    say=say,
    secret=secret,
  )
  # It would take SIGTERM away from us; see `notices` for what we do instead.
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
    # What it could detect is known.
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
  return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def is_first() -> bool:
  """Returns whether this process writes what is written once."""
  return jax.process_index() == 0


def host_name(index: int) -> str:
  """Returns `host 3 (name)`."""
  name = _host_names[index] if index < len(_host_names) else "?"
  return f"host {index} ({name})"


def client() -> Any:
  """Returns jax's connection to its coordination service, None without."""
  # Not public; Orbax reaches for the same.
  from jax._src import distributed

  return distributed.global_state.client


def barrier(name: str, timeout: float = BARRIER_SECONDS) -> None:
  """Waits until all hosts are here.

  Args:
    name: of this place, for the message.
    timeout: in seconds.

  Raises:
    HostsLost: some did not come in time.
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
  """Returns the hosts that a message of the coordination service names."""
  match = re.search(r"timed out task names:\s*((?:\S*\d+\s*)+)", message)
  numbers = re.findall(r"(\d+)\s", match.group(1) + " ") if match else []
  if not numbers:
    return " ".join(message.split())[:300]
  return ", ".join(host_name(int(n)) for n in numbers) + " did not arrive"


def gather_json(value: Any) -> list[Any]:
  """Returns a value of each host, in order, on all of them.

  Args:
    value: anything that JSON can hold.
  """
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
