"""Collects and compares all processes of a run before jax connects them.

Process 0 listens on the coordinator's port until all others have sent their
hello, then sends all of them the result. jax's own start would do the same, but
if a process is missing it aborts the others without naming it.
"""

import errno
import socket
import time
from collections.abc import Callable, Mapping

from narvl_jax.errors import UserError
from narvl_jax.hosts.cluster import Cluster
from narvl_jax.hosts.differences import describe_differences
from narvl_jax.hosts.gathering import Gathering
from narvl_jax.hosts.messages import (
  Message,
  decode,
  encode,
  is_signed,
  make_nonce,
  read_line,
)

SECRET_VARIABLE = "NARVL_CLUSTER_SECRET"

_MIN_SECRET = 16
_POLL_SECONDS = 0.5
_SEND_SECONDS = 5.0
# The others wait longer than process 0, which reports who is missing.
_GRACE_SECONDS = 10.0


def meet(
  cluster: Cluster,
  facts: Mapping[str, str],
  say: Callable[[str], None],
  secret: str | None = None,
) -> list[str]:
  """Waits for all processes, compares their facts; returns the host names.

  Args:
    facts: facts of this process that must be equal in all.
    secret: shared by all processes, which prove it to each other; None accepts
      any connection.

  Raises:
    UserError: in every process, if one is missing, present twice or different.
  """
  if secret is not None and len(secret) < _MIN_SECRET:
    raise UserError(
      f"{SECRET_VARIABLE} has {len(secret)} characters, so it could be"
      f" guessed; use {_MIN_SECRET} or more, as `openssl rand -hex 16` makes"
      " them"
    )
  hello = {
    "process_id": cluster.process_id,
    "num_processes": cluster.num_processes,
    "host": socket.gethostname(),
    "facts": dict(facts),
  }
  address, timeout = cluster.coordinator_address, cluster.start_timeout
  if cluster.process_id:
    return _ask(address, hello, timeout, secret)
  with _listen(address) as listener:
    gathering = Gathering(hello, secret, say)
    try:
      gathering.wait(listener, timeout)
      hellos = [hello for _, hello in sorted(gathering.hellos.items())]
      names = [hello["host"] for hello in hellos]
      difference = describe_differences([x["facts"] for x in hellos], names)
      if difference:
        raise UserError(difference)
      gathering.answer({"names": names})
      return names
    except UserError as error:
      gathering.answer({"error": str(error)})
      raise
    finally:
      gathering.close()


def is_local(address: str) -> bool:
  """Returns whether HOST:PORT can be reached from this machine only."""
  host = address.rsplit(":", 1)[0]
  return host == "localhost" or host.startswith("127.")


def _listen(address: str) -> socket.socket:
  host, number = address.rsplit(":", 1)
  port = int(number)
  try:
    if is_local(address):
      # No other machine needs to reach it.
      return socket.create_server((host, port), backlog=1024)
    if socket.has_dualstack_ipv6():
      try:
        return socket.create_server(
          ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
      except PermissionError:
        raise
      except OSError as error:
        if error.errno == errno.EADDRINUSE:
          raise
    return socket.create_server(("", port), backlog=1024)
  except OSError as error:
    raise UserError(
      f"process 0 cannot listen on port {port} ({error.strerror}): is another"
      " run, or another --process_id=0, on this machine? Nearest valid:"
      f" another port in --coordinator_address, such as {_free_port()}"
    ) from error


def _free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def _ask(
  address: str, hello: Message, timeout: float, secret: str | None
) -> list[str]:
  """Sends the hello to process 0 and waits for its answer."""
  deadline = time.monotonic() + timeout + _GRACE_SECONDS
  why = ""
  while deadline - time.monotonic() > (_GRACE_SECONDS if why else 0):
    try:
      return _ask_once(address, hello, deadline, secret)
    except OSError as error:
      why = error.strerror or str(error)
      time.sleep(_POLL_SECONDS)
  raise UserError(
    f"process {hello['process_id']} ({hello['host']}) cannot reach process"
    f" 0 at {address} within {timeout:g} s ({why}): check that process 0"
    " was started, --coordinator_address, the port and the firewall, or"
    " raise --start_timeout"
  )


def _ask_once(
  address: str, hello: Message, deadline: float, secret: str | None
) -> list[str]:
  """Returns the host names that process 0 sends.

  Raises:
    OSError: it cannot be reached, ended, or is another program.
    UserError: it reports a mistake, or only one of the two has the secret.
  """
  host, port = address.rsplit(":", 1)
  with socket.create_connection((host.strip("[]"), int(port)), 5) as link:
    challenge = decode(read_line(link, min(deadline, time.monotonic() + 10)))
    if challenge is None or not isinstance(challenge.get("nonce"), str):
      raise OSError("it sends an unknown answer")
    own = f"process {hello['process_id']} ({hello['host']})"
    if secret is not None and not challenge.get("signed"):
      raise UserError(
        f"process 0 at {address} was started without {SECRET_VARIABLE}, {own}"
        " with it; set it to the same value on all hosts"
      )
    nonces = (challenge["nonce"], make_nonce())
    link.settimeout(_SEND_SECONDS)
    link.sendall(encode(hello | {"nonce": nonces[1]}, secret, "hello", *nonces))
    answer = decode(read_line(link, deadline))
  if answer is None:
    raise OSError("it sends an unknown answer")
  if "refused" in answer:
    # Unsigned: a forged rejection only ends this process.
    why = f"it rejected this one: {str(answer['refused'])[:200]}"
    if answer.get("final") is not True:
      raise OSError(why)
    raise UserError(
      f"process 0 at {address} does not accept {own}, {why}; set"
      f" {SECRET_VARIABLE} to the same value on all hosts"
    )
  if not is_signed(answer, secret, "answer", *nonces):
    raise UserError(
      f"the program at {address} does not know {SECRET_VARIABLE}; set it to"
      " the same value on all hosts, or use another port"
    )
  if "error" in answer:
    raise UserError(str(answer["error"]))
  names = answer.get("names")
  if not isinstance(names, list) or len(names) != hello["num_processes"]:
    raise OSError("it sends an unknown answer")
  return [str(name) for name in names]
