"""The stores themselves: an emulator of GCS, and moto for S3, in threads."""

import contextlib
import functools
import http
import http.client
import http.server
import io
import itertools
import json
import logging
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

from tests.stores.proxy import Faults, Proxy

_numbers = itertools.count()


class Store:
  """A store behind a proxy.

  Attributes:
    scheme: "gs" or "s3".
    url: address of the proxy.
    faults: faults of the proxy.
    environment: variables with which code and commands find the store.
  """

  def __init__(self, scheme: str, proxy: Proxy) -> None:
    self.scheme, self.url, self.faults = scheme, proxy.url, proxy.faults
    if scheme == "gs":
      self.environment = {
        "STORAGE_EMULATOR_HOST": proxy.url,
        "TENSORSTORE_GCS_HTTP_URL": proxy.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        # Otherwise credentials are sought on the network.
        "NO_GCE_CHECK": "true",
        # Otherwise gcsfs asks Google for the kind of each bucket.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      }
    else:
      self.environment = {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
      }

  def make_bucket(self) -> str:
    """Returns the address of a new bucket, such as "gs://bucket-3"."""
    name = f"bucket-{next(_numbers)}"
    port = int(self.url.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
      if self.scheme == "gs":
        body, headers = f'{{"name": "{name}"}}', {}
        headers["Content-Type"] = "application/json"
        connection.request("POST", "/storage/v1/b?project=p", body, headers)
      else:
        connection.request("PUT", f"/{name}")
      assert connection.getresponse().status == http.HTTPStatus.OK
    return f"{self.scheme}://{name}"


@contextlib.contextmanager
def serving(scheme: str, port: int = 0) -> Iterator[Store]:
  """Runs a store and its proxy in threads of this process."""
  with _gcs() if scheme == "gs" else _s3() as store_port:
    proxy = Proxy(store_port, port)
    with _in_thread(proxy):
      yield Store(scheme, proxy)


@contextlib.contextmanager
def _in_thread(server: http.server.HTTPServer) -> Iterator[None]:
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield
  finally:
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def _gcs() -> Iterator[int]:
  from gcp_storage_emulator import server, storage

  # It warns of every answer that is a text.
  logging.getLogger(server.__name__).setLevel(logging.CRITICAL)
  logging.getLogger("api.object").setLevel(logging.CRITICAL)
  logging.getLogger(storage.__name__).setLevel(logging.CRITICAL)
  if not isinstance(server._read_data, functools.partial):
    server._read_data = functools.partial(_read_data, server._read_data)
  files = storage.Storage(use_memory_fs=True)
  lock = threading.Lock()

  class Handler(server.RequestHandler):
    """The emulator with the conditions on generations, which it ignores."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
      body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
      connection, self.rfile = self.rfile, io.BytesIO(body)
      with lock:
        if _holds_condition(self.path, body, files):
          server.Router(self).handle(self.command)
        else:
          condition = "ifGenerationMatch" in self.path
          self.send_response(412 if condition else 404)
          self.send_header("Content-Length", "0")
          self.end_headers()
      self.rfile = connection

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def end_headers(self) -> None:
      if self.command == "GET" and "alt=media" in self.path:
        # TensorStore needs it.
        self.send_header("x-goog-generation", _generation(self.path, files))
      super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
      del format, args

  made = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(Handler, files)
  )
  made.daemon_threads = True
  made.socket.listen(256)
  with _in_thread(made):
    yield made.server_address[1]


def _holds_condition(path: str, body: bytes, files: Any) -> bool:
  """Returns whether an object has the generation of a request, if any."""
  query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
  wanted = query.get("ifGenerationMatch") or query.get("generation")
  if wanted is None or "upload_id" in query:
    return True
  return _generation(path, files, body) == wanted[0]


def _generation(path: str, files: Any, body: bytes = b"") -> str:
  """Returns the generation of the object that a request names."""
  from gcp_storage_emulator.exceptions import NotFound

  parts = urllib.parse.urlsplit(path)
  query = urllib.parse.parse_qs(parts.query)
  bucket, _, name = parts.path.split("/b/", 1)[1].partition("/o")
  name = urllib.parse.unquote(name.strip("/")) or query.get("name", [""])[0]
  name = name or _parts(body)["meta"]["name"]
  try:
    return str(files.get_file_obj(bucket, name)["generation"])
  except NotFound:
    return "0"


def _read_data(read: Any, handler: Any, query: Any) -> Any:
  """Reads a body; the emulator's own parser changes some binary contents."""
  if not handler.headers.get("Content-Type", "").startswith("multipart/rel"):
    return read(handler, query)
  return _parts(handler.rfile.read())


def _parts(body: bytes) -> dict[str, Any]:
  """Returns metadata and content of an upload in two parts."""
  boundary, _, rest = body.partition(b"\n")
  meta, content = rest.split(b"\n" + boundary.strip() + b"\n", 1)
  head, _, content = content.partition(b"\n\n")
  return {
    "meta": json.loads(meta.partition(b"\n\n")[2]),
    "content": content.removesuffix(b"\n" + boundary.strip() + b"--"),
    "content-type": head.decode().partition(": ")[2].strip(),
  }


@contextlib.contextmanager
def _s3() -> Iterator[int]:
  from moto.moto_server.threaded_moto_server import ThreadedMotoServer

  logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
  made = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
  made.start()
  try:
    yield made.get_host_and_port()[1]
  finally:
    made.stop()


__all__ = ["Faults", "Store", "serving"]
