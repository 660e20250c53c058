"""Collects the hellos of the other processes, in process 0."""

import selectors
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from narvl_jax.errors import UserError, list_few
from narvl_jax.hosts.messages import (
  MAX_BYTES,
  Message,
  decode,
  encode,
  is_signed,
  make_nonce,
  what_is_wrong,
)

# A process of this run sends its hello at once.
_HELLO_SECONDS = 10.0
# Seconds for all answers together.
_ANSWER_SECONDS = 5.0
_PROGRESS_SECONDS = 30.0
_POLL_SECONDS = 0.5
# Largest number of open connections without a hello.
_MAX_PENDING = 256
# Rejected connections that are reported; more would only fill the log.
_MAX_REFUSALS = 20


class _Caller:
  """A connection that has not sent its hello yet."""

  def __init__(self, connection: socket.socket, address: str) -> None:
    self.connection, self.address = connection, address
    self.nonce = make_nonce()
    self.received = bytearray()
    self.since = time.monotonic()


class _Member:
  """A process whose hello was accepted."""

  def __init__(self, caller: _Caller, hello: Message) -> None:
    self.connection, self.hello = caller.connection, hello
    self.nonces = (caller.nonce, str(hello.get("nonce", "")))


class Gathering:
  """The processes that have connected so far.

  Connections are non-blocking, so a slow one does not delay the others.
  """

  def __init__(
    self, own: Message, secret: str | None, say: Callable[[str], None]
  ) -> None:
    self._own = own
    self._count: int = own["num_processes"]
    self._secret = secret
    self._say = say
    self._members: dict[int, _Member] = {}
    self._pending: dict[socket.socket, _Caller] = {}
    self._refused: list[str] = []
    self._selector = selectors.DefaultSelector()

  @property
  def hellos(self) -> dict[int, Message]:
    """The hello of each process so far."""
    return {0: self._own} | {i: x.hello for i, x in self._members.items()}

  def wait(self, listener: socket.socket, timeout: float) -> None:
    """Returns when all processes have connected to `listener`.

    Raises:
      UserError: some did not within `timeout` seconds, or do not match.
    """
    listener.setblocking(False)
    self._selector.register(listener, selectors.EVENT_READ)
    deadline = time.monotonic() + timeout
    spoken = time.monotonic()
    while missing := self._missing() or self._drop_gone():
      now = time.monotonic()
      if now > deadline:
        refused = "; rejected: " if self._refused else ""
        refused += ", ".join(self._refused[:4])
        raise UserError(
          f"{_processes(missing)} did not connect within {timeout:g} s, of"
          f" {self._count}: check that it was started and reaches the"
          f" coordinator (the list above){refused}, or raise --start_timeout"
        )
      if now > spoken + _PROGRESS_SECONDS:
        spoken = now
        self._say(f"still waiting for {_processes(missing)}")
      self._drop_silent(now)
      for key, _ in self._selector.select(min(_POLL_SECONDS, deadline - now)):
        if key.fileobj is listener:
          self._accept(listener)
        elif (caller := self._pending.get(key.fileobj)) is not None:  # pyright: ignore
          self._hear(caller)
        else:
          self._drop_gone(key.fileobj)
    self._selector.unregister(listener)

  def answer(self, value: Mapping[str, Any]) -> None:
    """Sends a message to all processes."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    for member in self._members.values():
      line = encode(value, self._secret, "answer", *member.nonces)
      _send(member.connection, line, deadline - time.monotonic())

  def close(self) -> None:
    """Closes all connections."""
    for holder in (*self._members.values(), *self._pending.values()):
      holder.connection.close()
    self._selector.close()

  def _missing(self) -> list[int]:
    return [i for i in range(1, self._count) if i not in self._members]

  def _accept(self, listener: socket.socket) -> None:
    try:
      connection, address = listener.accept()
    except OSError:
      return  # Closed by the other end.
    if len(self._pending) >= _MAX_PENDING:
      # Dicts are ordered: the oldest one.
      self._forget(next(iter(self._pending.values())))
    caller = _Caller(connection, str(address[0]))
    connection.setblocking(False)
    challenge = {"nonce": caller.nonce, "signed": self._secret is not None}
    if not _send(connection, encode(challenge, None), 0):
      connection.close()
      return
    self._pending[connection] = caller
    self._selector.register(connection, selectors.EVENT_READ)

  def _hear(self, caller: _Caller) -> None:
    """Reads the available part of a hello."""
    try:
      data = caller.connection.recv(1 << 16)
    except BlockingIOError:
      return
    except OSError:
      data = b""
    if not data:
      # For example a port scanner, or a process that was stopped.
      self._forget(caller)
      return
    caller.received += data
    line, found, _ = caller.received.partition(b"\n")
    if len(line) > MAX_BYTES:
      self._refuse(caller, "its hello is too long")
    elif found:
      self._take(caller, decode(bytes(line)))

  def _take(self, caller: _Caller, hello: Message | None) -> None:
    """Accepts or rejects a caller.

    Raises:
      UserError: it belongs to this run but does not match.
    """
    wrong = what_is_wrong(hello)
    if wrong or hello is None:
      self._refuse(caller, wrong or "")
      return
    nonces = (caller.nonce, str(hello.get("nonce", "")))
    if not is_signed(hello, self._secret, "hello", *nonces):
      why = "it does not know the NARVL_CLUSTER_SECRET of process 0"
      self._refuse(caller, why, final=True)
      return
    problem = self._problem(hello)
    if problem:
      line = encode({"error": problem}, self._secret, "answer", *nonces)
      _send(caller.connection, line, _ANSWER_SECONDS)
      self._forget(caller)
      raise UserError(problem)
    del self._pending[caller.connection]
    self._members[hello["process_id"]] = _Member(caller, hello)

  def _problem(self, hello: Message) -> str | None:
    number, host = hello["process_id"], hello["host"]
    if hello["num_processes"] != self._count:
      return (
        f"process {number} ({host}) has"
        f" --num_processes={hello['num_processes']}, process 0"
        f" ({self._own['host']}) has --num_processes={self._count}; give"
        " all the same"
      )
    if number >= self._count:
      return (
        f"process {number} ({host}) is not one of 0 to {self._count - 1}; give"
        f" it --process_id={self._count - 1} or below"
      )
    if number in self._members:
      self._drop_if_gone(number)
    here = self.hellos
    if number in here:
      missing = self._missing()
      near = f" --process_id={missing[0]}" if missing else ""
      return (
        f"two processes have --process_id={number}: on"
        f" {here[number]['host']} and on {host}; give one of them"
        f"{near or ' another'}"
      )
    return None

  def _refuse(self, caller: _Caller, why: str, final: bool = False) -> None:
    """Rejects and reports a connection; `final` requests no retry."""
    line = encode({"refused": why, "final": final}, None)
    _send(caller.connection, line, 0)
    self._forget(caller)
    text = f"{caller.address}: {why}"
    if text not in self._refused and len(self._refused) < _MAX_REFUSALS:
      self._refused.append(text)
      self._say(f"rejected a connection from {text}")

  def _forget(self, caller: _Caller) -> None:
    del self._pending[caller.connection]
    self._selector.unregister(caller.connection)
    caller.connection.close()

  def _drop_silent(self, now: float) -> None:
    for caller in list(self._pending.values()):
      if now > caller.since + _HELLO_SECONDS:
        self._refuse(caller, f"no hello within {_HELLO_SECONDS:g} s")

  def _drop_gone(self, connection: Any = None) -> list[int]:
    """Removes processes that ended or sent data after their hello.

    Looks at one connection only, if given; returns the missing processes.
    """
    for number, member in list(self._members.items()):
      if connection in (None, member.connection):
        self._drop_if_gone(number)
    return self._missing()

  def _drop_if_gone(self, number: int) -> None:
    connection = self._members[number].connection
    try:
      connection.recv(1 << 16)
    except BlockingIOError:
      return
    except OSError:
      pass
    # Closed, or data that no process of this run sends.
    self._selector.unregister(connection)
    connection.close()
    del self._members[number]


def _processes(numbers: list[int]) -> str:
  shown = list_few([str(number) for number in numbers], 8)
  return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"


def _send(connection: socket.socket, line: bytes, seconds: float) -> bool:
  """Sends a line; returns whether that succeeded."""
  try:
    connection.settimeout(max(seconds, 0.01))
    connection.sendall(line)
    connection.setblocking(False)
  except OSError:
    return False
  return True
