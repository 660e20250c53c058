"""How the processes of a run find each other, before jax connects them.

Process 0 listens on the coordinator's port until all others have told it who
they are, then tells all of them how it went. jax's own start does the same,
but where a process is missing it ends every other with an abort that names
nobody.
"""

import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from narvl_jax.errors import UserError

# What a process says of itself: see `meet`.
Hello = dict[str, Any]

_POLL_SECONDS = 0.5
# Who connects speaks at once; what does not is no process of ours.
_HELLO_SECONDS = 5.0
# How much longer than process 0 the others wait, for it says what is missing.
_GRACE_SECONDS = 10.0
_PROGRESS_SECONDS = 30.0
_MAX_BYTES = 1 << 22


def meet(
  address: str,
  num_processes: int,
  process_id: int,
  facts: Mapping[str, str],
  *,
  timeout: float,
  compare: Callable[[list[Mapping[str, str]], list[str]], str | None],
  say: Callable[[str], None],
) -> list[str]:
  """Waits for all processes and has process 0 compare them.

  Args:
    address: of process 0, HOST:PORT.
    num_processes: how many there are.
    process_id: which one this is.
    facts: of this process, that should be the same in all.
    timeout: seconds to wait for the others.
    compare: (facts, host names), both by process, -> what differs, or None.
    say: prints a line.

  Returns:
    The host names by process.

  Raises:
    UserError: in every process: one is missing, there twice, or differs.
  """
  hello = {
    "process_id": process_id,
    "num_processes": num_processes,
    "host": socket.gethostname(),
    "facts": dict(facts),
  }
  if process_id:
    return _ask(address, hello, timeout)
  with _listen(address) as listener:
    gathering = _Gathering(hello, num_processes)
    try:
      gathering.wait(listener, timeout, say)
      hellos = [gathering.hellos[i] for i in range(num_processes)]
      names = [hello["host"] for hello in hellos]
      difference = compare([hello["facts"] for hello in hellos], names)
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
      # Then nobody else needs to reach it.
      return socket.create_server((host, port), backlog=1024)
    if socket.has_dualstack_ipv6():
      try:
        return socket.create_server(
          ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
      except PermissionError:
        raise
      except OSError as error:
        if _in_use(error):
          raise
    return socket.create_server(("", port), backlog=1024)
  except OSError as error:
    raise UserError(
      f"process 0 cannot listen on port {port} ({error.strerror}): is another"
      " run, or another --process_id=0, on this machine? Nearest valid:"
      f" another port in --coordinator_address, such as {_free_port()}"
    ) from error


def _in_use(error: OSError) -> bool:
  import errno

  return error.errno == errno.EADDRINUSE


def _free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


class _Gathering:
  """What process 0 knows of the others while it waits."""

  def __init__(self, own: Hello, num_processes: int) -> None:
    self.hellos: dict[int, Hello] = {0: own}
    self._count = num_processes
    self._connections: dict[int, socket.socket] = {}

  def wait(
    self, listener: socket.socket, timeout: float, say: Callable[[str], None]
  ) -> None:
    """Returns when all are there.

    Raises:
      UserError: some did not come, or do not fit.
    """
    deadline = time.monotonic() + timeout
    spoken = time.monotonic()
    while self._missing():
      if time.monotonic() > deadline:
        raise UserError(
          f"{self._describe_missing()} did not come within {timeout:g} s, of"
          f" {self._count}: check that it was started and reaches the"
          " coordinator (the list above), or raise --start_timeout"
        )
      if time.monotonic() > spoken + _PROGRESS_SECONDS:
        spoken = time.monotonic()
        say(f"still waiting for {self._describe_missing()}")
      listener.settimeout(_POLL_SECONDS)
      try:
        connection, _ = listener.accept()
      except TimeoutError:
        self._drop_lost()
        continue
      self._receive(connection)
      if not self._missing():
        self._drop_lost()

  def answer(self, value: Mapping[str, Any]) -> None:
    """Tells all that came."""
    for connection in self._connections.values():
      _send(connection, value)

  def close(self) -> None:
    """Lets all go."""
    for connection in self._connections.values():
      connection.close()

  def _missing(self) -> list[int]:
    return [i for i in range(self._count) if i not in self.hellos]

  def _describe_missing(self) -> str:
    missing = self._missing()
    shown = ", ".join(map(str, missing[:8]))
    if len(missing) > 8:
      shown += f" and {len(missing) - 8} more"
    return f"process {shown}" if len(missing) == 1 else f"processes {shown}"

  def _receive(self, connection: socket.socket) -> None:
    hello = _read(connection, _HELLO_SECONDS)
    if hello is None or not {"process_id", "num_processes", "host"} <= {*hello}:
      connection.close()
      return
    self._drop_lost()
    problem = self._problem(hello)
    if problem:
      _send(connection, {"error": problem})
      connection.close()
      raise UserError(problem)
    self.hellos[hello["process_id"]] = hello
    self._connections[hello["process_id"]] = connection

  def _problem(self, hello: Hello) -> str | None:
    number, host = hello["process_id"], hello["host"]
    if hello["num_processes"] != self._count:
      return (
        f"process {number} ({host}) has"
        f" --num_processes={hello['num_processes']}, process 0"
        f" ({self.hellos[0]['host']}) has --num_processes={self._count}; give"
        " all the same"
      )
    if number in self.hellos:
      missing = self._missing()
      near = f" --process_id={missing[0]}" if missing else ""
      return (
        f"two processes have --process_id={number}: on"
        f" {self.hellos[number]['host']} and on {host}; give one of them"
        f"{near or ' another'}"
      )
    return None

  def _drop_lost(self) -> None:
    """Forgets processes that came and ended."""
    for number, connection in list(self._connections.items()):
      connection.setblocking(False)
      try:
        lost = not connection.recv(1, socket.MSG_PEEK)
      except BlockingIOError:
        lost = False
      except OSError:
        lost = True
      if lost:
        connection.close()
        del self._connections[number], self.hellos[number]


def _ask(address: str, hello: Hello, timeout: float) -> list[str]:
  """Tells process 0 of this one and waits for its answer."""
  host, port = address.rsplit(":", 1)
  deadline = time.monotonic() + timeout + _GRACE_SECONDS
  answer, why = None, ""
  while answer is None:
    left = deadline - time.monotonic()
    if left <= (0 if not why else _GRACE_SECONDS):
      raise UserError(
        f"process {hello['process_id']} ({hello['host']}) cannot reach process"
        f" 0 at {address} within {timeout:g} s ({why}): check that process 0"
        " was started, --coordinator_address, the port and the firewall, or"
        " raise --start_timeout"
      )
    try:
      with socket.create_connection((host.strip("[]"), int(port)), 5) as link:
        why = "it does not answer"
        _send(link, hello)
        answer = _read(link, max(deadline - time.monotonic(), 0.1))
        if answer is None:
          time.sleep(_POLL_SECONDS)
    except OSError as error:
      why = error.strerror or str(error)
      time.sleep(_POLL_SECONDS)
  if "error" in answer:
    raise UserError(answer["error"])
  return answer["names"]


def _send(connection: socket.socket, value: Mapping[str, Any]) -> None:
  """Sends a line of JSON; a receiver that is gone does not matter."""
  try:
    connection.settimeout(_HELLO_SECONDS)
    connection.sendall(json.dumps(value).encode() + b"\n")
  except OSError:
    pass


def _read(connection: socket.socket, timeout: float) -> dict[str, Any] | None:
  """Returns what a line of JSON says, None if there is no such line."""
  try:
    connection.settimeout(timeout)
    with connection.makefile("rb") as stream:
      value = json.loads(stream.readline(_MAX_BYTES))
  except (OSError, ValueError):
    return None
  return value if isinstance(value, dict) else None
