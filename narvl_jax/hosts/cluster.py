"""The cluster that this process belongs to, from flags or the environment."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from narvl_jax.errors import UserError
from narvl_jax.hosts.slurm import expand_nodes

# --help of a command lists these flags as its own.
flags.disclaim_key_flags()

# Folder of the output of each process, within the folder of the run.
LOG_FOLDER = "logs"
HEARTBEAT_SECONDS = 60
_MODES = ("auto", "on", "off")
_FLAGS = ("coordinator_address", "num_processes", "process_id")


class Cluster(NamedTuple):
  """The processes of a run, and the index of this one.

  Attributes:
    coordinator_address: HOST:PORT of process 0.
    process_id: index of this one.
    local_device_ids: devices of this machine that it uses; None for all.
    start_timeout: seconds to wait for the others.
    heartbeat_timeout: seconds without a heartbeat after which one is lost.
    found_by: "flags" or "the environment".
  """

  coordinator_address: str
  num_processes: int
  process_id: int
  local_device_ids: Sequence[int] | None = None
  start_timeout: int = 300
  heartbeat_timeout: float = HEARTBEAT_SECONDS
  found_by: str = "flags"


def define_flags() -> None:
  """Defines the flags of a command that runs in several processes."""
  flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, the same for all."
  )
  flags.DEFINE_integer("num_processes", None, "Number of processes.")
  flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
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
  """Returns the cluster of the flags or the environment, None for one process.

  Args:
    settings: has the flags as attributes.

  Raises:
    UserError: flags are missing, out of range or contradict each other.
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
  """Returns the cluster that jax detects."""
  # Not public: the public function starts the coordination service.
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
  """Corrects the coordinator's address in a SLURM job.

  jax reads a node list only up to its first bracket.
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
