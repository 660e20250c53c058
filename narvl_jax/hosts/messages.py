"""Messages between processes at the start, signed with a shared secret.

A message is one line of JSON. With a secret it carries an HMAC of its content
and of the nonces that both ends chose for the connection. So the secret itself
is not sent, and an old message cannot be replayed.
"""

import hashlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]

# The facts of a process are about 10 kB.
MAX_BYTES = 1 << 20
_MAX_HOST_NAME = 255


def make_nonce() -> str:
  """Returns a random text that is used once."""
  return secrets.token_hex(16)


def encode(
  message: Mapping[str, Any], secret: str | None, *context: str
) -> bytes:
  """Returns a message as a line, signed if there is a secret."""
  signed = dict(message)
  if secret is not None:
    signed["mac"] = _mac(message, secret, context)
  return json.dumps(signed).encode() + b"\n"


def is_signed(message: Message, secret: str | None, *context: str) -> bool:
  """Returns whether the sender of a message knows the secret."""
  if secret is None:
    return True
  given = message.get("mac")
  content = {key: value for key, value in message.items() if key != "mac"}
  return isinstance(given, str) and hmac.compare_digest(
    given.encode("utf-8", "replace"), _mac(content, secret, context).encode()
  )


def decode(line: bytes) -> Message | None:
  """Returns the message of a line, None if it is not one."""
  try:
    value = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None


def what_is_wrong(hello: Message | None) -> str | None:
  """Returns why a message is not a valid hello, None if it is."""
  if hello is None:
    return "it sent no hello of such a process"
  for name in ("process_id", "num_processes"):
    value = hello.get(name)
    if type(value) is not int or not 0 <= value < 1 << 31:
      return f"its hello has no proper {name}"
  host = hello.get("host")
  if (
    not isinstance(host, str)
    or not 0 < len(host) <= _MAX_HOST_NAME
    or not host.isprintable()
  ):
    return "its hello has no proper host"
  facts = hello.get("facts")
  if not isinstance(facts, dict) or not all(
    isinstance(value, str) for value in facts.values()
  ):
    return "its hello has no proper facts"
  return None


def read_line(connection: socket.socket, deadline: float) -> bytes:
  """Returns the next line.

  Raises:
    OSError: the line is late or too long, or the other end has closed.
  """
  line = b""
  while not line.endswith(b"\n"):
    connection.settimeout(max(deadline - time.monotonic(), 0.01))
    try:
      # Peeks, since what follows the line belongs to the next message.
      data = connection.recv(1 << 16, socket.MSG_PEEK)
    except TimeoutError:
      data = b""
    if not data or time.monotonic() > deadline:
      raise OSError("it does not answer")
    end = data.find(b"\n") + 1
    line += connection.recv(end or len(data))
    if len(line) > MAX_BYTES:
      raise OSError("its message is too long")
  return line


def _mac(
  message: Mapping[str, Any], secret: str, context: tuple[str, ...]
) -> str:
  content = json.dumps([context, message], sort_keys=True)
  return hmac.new(secret.encode(), content.encode(), hashlib.sha256).hexdigest()
