"""A proxy in front of a store that delays, rejects or cuts requests."""

import collections
import dataclasses
import http.client
import http.server
import re
import threading
import time
from typing import Any

# Kept by the connection, not passed on.
_OWN_HEADERS = ("connection", "transfer-encoding", "content-length")
CUT = 0


@dataclasses.dataclass
class _Fault:
  match: str
  status: int
  times: int


class Faults:
  """What goes wrong between the code under test and a store.

  Attributes:
    latency: seconds before each answer.
    requests: "METHOD /path?query" of all requests.
  """

  def __init__(self) -> None:
    self.latency = 0.0
    self.requests: collections.deque[str] = collections.deque(maxlen=100_000)
    self._faults: list[_Fault] = []
    self._lock = threading.Lock()

  def fail(self, match: str = "", status: int = 503, times: int = 1) -> None:
    """Makes the next `times` requests fail.

    Args:
      match: pattern, such as "GET .*a.jpg".
      status: such as 429 or 503; `CUT` sends a part of the answer and closes
        the connection.
    """
    with self._lock:
      self._faults.append(_Fault(match, status, times))

  def reset(self) -> None:
    """Ends all faults and forgets the requests."""
    with self._lock:
      self._faults.clear()
    self.latency = 0.0
    self.requests.clear()

  def next(self, request: str) -> int | None:
    """Returns the status with which a request fails; None if it succeeds."""
    self.requests.append(request)
    with self._lock:
      for fault in self._faults:
        if fault.times > 0 and re.search(fault.match, request):
          fault.times -= 1
          return fault.status
    return None


class Proxy(http.server.ThreadingHTTPServer):
  """Passes requests to a store at `127.0.0.1:port`.

  Attributes:
    url: its own address.
    faults: what it does to the requests.
  """

  daemon_threads = True
  request_queue_size = 256

  def __init__(self, port: int, own_port: int = 0) -> None:
    super().__init__(("127.0.0.1", own_port), _Handler)
    self.store_port = port
    self.faults = Faults()
    self.url = f"http://127.0.0.1:{self.server_address[1]}"

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Prints nothing: clients that are killed close their connections."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  # Otherwise an answer in two parts waits for the client's acknowledgement.
  disable_nagle_algorithm = True
  server: Proxy
  _store: http.client.HTTPConnection | None = None

  def _pass_on(self) -> None:
    body = self._body()
    faults = self.server.faults
    fault = faults.next(f"{self.command} {self.path}")
    time.sleep(faults.latency)
    if fault is not None and fault != CUT:
      self._answer(fault, "fault", [], b"")
      return
    response, content = self._ask(body)
    self._answer(
      response.status, response.reason, response.getheaders(), content,
      cut=fault == CUT,
    )  # fmt: skip

  do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _pass_on

  def _body(self) -> bytes:
    if "chunked" not in self.headers.get("Transfer-Encoding", ""):
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    parts = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    while self.rfile.readline().strip():
      pass
    return b"".join(parts)

  def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
    headers = {
      key: value
      for key, value in self.headers.items()
      if key.lower() not in _OWN_HEADERS
    }
    headers["Content-Length"] = str(len(body))
    store = http.client.HTTPConnection("127.0.0.1", self.server.store_port)
    try:
      store.request(self.command, self.path, body, headers)
      response = store.getresponse()
      return response, response.read()
    finally:
      store.close()

  def _answer(
    self,
    status: int,
    reason: str,
    headers: list[tuple[str, str]],
    content: bytes,
    *,
    cut: bool = False,
  ) -> None:
    self.send_response_only(status, reason)
    length = str(len(content))
    for key, value in headers:
      if key.lower() == "content-length" and self.command == "HEAD":
        # The length of what a GET would return.
        length = value
      elif key.lower() not in _OWN_HEADERS:
        self.send_header(key, value)
    self.send_header("Content-Length", length)
    self.end_headers()
    self.wfile.write(content[: len(content) // 2] if cut else content)
    self.close_connection = self.close_connection or cut
