"""The rendezvous: all processes, missing ones, duplicates, strangers."""

import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from narvl_jax.errors import UserError
from narvl_jax.hosts import gathering, messages, rendezvous
from narvl_jax.hosts.cluster import Cluster


@pytest.fixture
def port(monkeypatch) -> int:
  monkeypatch.setattr(rendezvous, "_POLL_SECONDS", 0.02)
  monkeypatch.setattr(gathering, "_POLL_SECONDS", 0.02)
  monkeypatch.setattr(gathering, "_HELLO_SECONDS", 1.0)
  monkeypatch.setattr(rendezvous, "_GRACE_SECONDS", 2.0)
  return rendezvous._free_port()


def _meet(port: int, count: int, index: int, **changes: Any) -> Any:
  """Returns the names, or the message of the error."""
  settings: dict[str, Any] = {
    "facts": {"version jax": "1"},
    "say": lambda _: None,
    **changes,
  }
  cluster = Cluster(
    f"127.0.0.1:{port}",
    count,
    index,
    start_timeout=settings.pop("timeout", 20.0),
  )
  try:
    return rendezvous.meet(cluster, **settings)
  except UserError as error:
    return str(error)


def _meet_all(port: int, hosts: list[tuple[int, int, dict]]) -> list[Any]:
  """Returns what (count, index, settings) of each process give."""
  with ThreadPoolExecutor(len(hosts)) as pool:
    started = [pool.submit(_meet, port, n, i, **s) for n, i, s in hosts]
    return [future.result() for future in started]


def test_all_learn_who_is_there(port):
  answers = _meet_all(port, [(3, i, {}) for i in (2, 0, 1)])
  assert answers == [[socket.gethostname()] * 3] * 3


def test_one_process_waits_for_nobody(port):
  assert _meet(port, 1, 0) == [socket.gethostname()]


def test_all_learn_which_host_differs(port):
  odd = {"facts": {"version jax": "2"}}
  answers = _meet_all(port, [(3, 0, {}), (3, 1, {}), (3, 2, odd)])
  name = socket.gethostname()
  assert (
    answers
    == [
      f"host 2 ({name}): version differs: jax 2, the others 1; start all hosts"
      " with the same code and flags"
    ]
    * 3
  )


def test_all_learn_what_is_missing(port):
  settings = {"timeout": 0.7}
  answers = _meet_all(port, [(4, 0, settings), (4, 2, settings)])
  assert answers[0] == answers[1]
  assert answers[0].startswith(
    "processes 1, 3 did not connect within 0.7 s, of 4: "
  )
  assert answers[0].endswith("--start_timeout")


def test_no_coordinator(port, monkeypatch):
  monkeypatch.setattr(rendezvous, "_GRACE_SECONDS", 0.1)
  answer = _meet(port, 2, 1, timeout=0.3)
  assert (
    f"process 1 ({socket.gethostname()}) cannot reach process 0 at"
    f" 127.0.0.1:{port} within 0.3 s (Connection refused)" in answer
  )
  assert "--coordinator_address, the port and the firewall" in answer


def test_port_in_use(port):
  with socket.create_server(("", port)):
    answer = _meet(port, 2, 0)
  assert f"process 0 cannot listen on port {port} (Address already" in answer


def test_two_processes_with_one_id(port):
  answers = _meet_all(port, [(3, 0, {}), (3, 1, {}), (3, 1, {})])
  for answer in answers:
    assert answer.startswith("two processes have --process_id=1: on ")
    assert answer.endswith("give one of them --process_id=2")


def test_another_number_of_processes(port):
  answers = _meet_all(port, [(3, 0, {}), (2, 1, {})])
  assert answers[0] == answers[1]
  assert "process 1 (" in answers[0]
  assert "--num_processes=2, process 0 (" in answers[0]


def _hello(port: int, text: bytes) -> socket.socket:
  while True:
    try:
      connection = socket.create_connection(("127.0.0.1", port), 5)
      connection.sendall(text)
      return connection
    except ConnectionRefusedError:
      continue


def test_strangers_and_processes_that_start_again(port):
  answers = []

  def first() -> None:
    answers.append(_meet(port, 3, 0))

  thread = threading.Thread(target=first)
  thread.start()
  # A browser, and silence.
  _hello(port, b"GET / HTTP/1.1\r\n\r\n").close()
  _hello(port, b"").close()
  hello = {"process_id": 1, "num_processes": 3, "host": "h", "facts": {}}
  # It came, and ended before all were there: as good as not there.
  _hello(port, json.dumps(hello).encode() + b"\n").close()
  answers += _meet_all(port, [(3, 1, {}), (3, 2, {})])
  thread.join()
  assert answers == [[socket.gethostname()] * 3] * 3


_HELLO: dict[str, Any] = {
  "process_id": 1,
  "num_processes": 2,
  "host": "h",
  "facts": {},
}
_SECRET = "0123456789abcdef0123"


@pytest.mark.parametrize(
  ("hello", "why"),
  [
    ({"process_id": 1, "num_processes": 2, "host": "h"}, "no proper facts"),
    (_HELLO | {"facts": {"a": 1}}, "no proper facts"),
    (_HELLO | {"facts": [1]}, "no proper facts"),
    (_HELLO | {"process_id": [1]}, "no proper process_id"),
    (_HELLO | {"process_id": True}, "no proper process_id"),
    (_HELLO | {"process_id": -1}, "no proper process_id"),
    (_HELLO | {"process_id": 1.5}, "no proper process_id"),
    (_HELLO | {"num_processes": "2"}, "no proper num_processes"),
    (_HELLO | {"host": None}, "no proper host"),
    (_HELLO | {"host": "\x1b]0;x\x07"}, "no proper host"),
    ([], "no hello of such a process"),
    (b"[" * 100_000, "no hello of such a process"),
    (b"\xff\xfe", "no hello of such a process"),
    (b'{"process_id": ' + b"9" * 5000 + b"}", "no hello of such a process"),
  ],
)
def test_a_malformed_hello_is_rejected_and_the_others_are_awaited(
  port, hello, why
):
  said: list[str] = []
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(_meet, port, 2, 0, say=said.append)
    text = hello if isinstance(hello, bytes) else json.dumps(hello).encode()
    stranger = _hello(port, text + b"\n")
    answer = stranger.makefile("rb").readlines()[-1]
    assert why in json.loads(answer)["refused"]
    assert _meet(port, 2, 1) == [socket.gethostname()] * 2
    assert first.result() == [socket.gethostname()] * 2
    stranger.close()
  (line,) = said
  assert line.startswith("rejected a connection from 127.0.0.1: ")
  assert why in line


def _send_for_ever(connection: socket.socket) -> None:
  while True:
    connection.sendall(b"x" * (1 << 16))


def test_a_hello_without_end(port):
  said: list[str] = []
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(_meet, port, 2, 0, say=said.append)
    stranger = _hello(port, b"")
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
      _send_for_ever(stranger)
    stranger.close()
    assert _meet(port, 2, 1) == first.result()
  assert said == ["rejected a connection from 127.0.0.1: its hello is too long"]


def test_a_slow_sender_delays_nobody(port, monkeypatch):
  """Neither beyond the deadline, nor those that come meanwhile."""
  monkeypatch.setattr(gathering, "_HELLO_SECONDS", 600.0)
  ended = threading.Event()
  strangers: list[socket.socket] = []

  def send() -> None:
    strangers.extend(_hello(port, b"{") for _ in range(3))
    while not ended.wait(0.01):
      for stranger in strangers:
        try:
          stranger.sendall(b" ")
        except OSError:
          return

  slow = threading.Thread(target=send)
  slow.start()
  assert _meet_all(port, [(2, 0, {}), (2, 1, {})]) == (
    [[socket.gethostname()] * 2] * 2
  )
  slow.join(20)
  slow = threading.Thread(target=send)
  slow.start()
  answer = _meet(port, 2, 0, timeout=0.5)
  assert answer.startswith("process 1 did not connect within 0.5 s, of 2: ")
  ended.set()
  slow.join(20)
  for stranger in strangers:
    stranger.close()


def test_silence_is_reported_with_its_address(port, monkeypatch):
  monkeypatch.setattr(gathering, "_HELLO_SECONDS", 0.1)
  said: list[str] = []
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(_meet, port, 2, 0, say=said.append, timeout=0.6)
    stranger = _hello(port, b"")
    answer = first.result()
    stranger.close()
  why = "127.0.0.1: no hello within 0.1 s"
  assert said == [f"rejected a connection from {why}"]
  assert f"; rejected: {why}, or raise --start_timeout" in answer


def test_many_strangers_at_once(port, monkeypatch):
  monkeypatch.setattr(gathering, "_MAX_PENDING", 4)
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(_meet, port, 2, 0)
    strangers = [_hello(port, b"") for _ in range(50)]
    assert _meet(port, 2, 1) == first.result()
    for stranger in strangers:
      stranger.close()


def _serve(port: int, *lines: bytes) -> threading.Thread:
  """Poses as process 0: sends a line at once and others after the hello."""
  server = socket.create_server(("127.0.0.1", port))

  def run() -> None:
    with server, server.accept()[0] as connection:
      connection.sendall(lines[0])
      connection.recv(1 << 16)
      with contextlib.suppress(OSError):
        for line in lines[1:]:
          connection.sendall(line)
        connection.recv(1)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  return thread


_CHALLENGE = b'{"nonce": "1", "signed": true}\n'


@pytest.mark.parametrize(
  "lines",
  [
    (b"SSH-2.0-x\n",),
    (b"[]\n",),
    (_CHALLENGE, b"{}\n"),
    (_CHALLENGE, b'{"names": "ab"}\n'),
    (_CHALLENGE, b'{"names": [1]}\n'),
    (_CHALLENGE, b"x" * 2**21),
  ],
)
def test_another_program_than_process_0_is_rejected(port, monkeypatch, lines):
  monkeypatch.setattr(rendezvous, "_GRACE_SECONDS", 0.1)
  _serve(port, *lines)
  answer = _meet(port, 2, 1, timeout=0.5)
  assert "cannot reach process 0" in answer


def test_a_slow_process_0_is_not_waited_for_longer(port, monkeypatch):
  monkeypatch.setattr(rendezvous, "_GRACE_SECONDS", 0.1)
  server = socket.create_server(("127.0.0.1", port))
  ended = threading.Event()

  def run() -> None:
    with server, server.accept()[0] as connection:
      connection.sendall(_CHALLENGE)
      while not ended.wait(0.01):
        try:
          connection.sendall(b" ")
        except OSError:
          return

  thread = threading.Thread(target=run)
  thread.start()
  assert "(it does not answer)" in _meet(port, 2, 1, timeout=0.5)
  ended.set()
  thread.join()


def test_all_know_the_secret(port):
  known = {"secret": _SECRET}
  answers = _meet_all(port, [(3, i, known) for i in range(3)])
  assert answers == [[socket.gethostname()] * 3] * 3


def test_a_connection_without_the_secret_is_rejected(port):
  """And the run begins once the right process has come."""
  said: list[str] = []
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(_meet, port, 2, 0, say=said.append, secret=_SECRET)
    for secret in (None, "another-secret-of-some-length"):
      answer = _meet(port, 2, 1, secret=secret)
      assert answer.startswith(f"process 0 at 127.0.0.1:{port} does not accept")
      assert answer.endswith(
        "it does not know the NARVL_CLUSTER_SECRET of process 0; set"
        " NARVL_CLUSTER_SECRET to the same value on all hosts"
      )
    # Words that would otherwise end the run of all.
    wrong = json.dumps(_HELLO | {"num_processes": 9, "mac": "0"}).encode()
    _hello(port, wrong + b"\n").close()
    assert _meet(port, 2, 1, secret=_SECRET) == [socket.gethostname()] * 2
    assert len(first.result()) == 2
  assert said == [
    "rejected a connection from 127.0.0.1: it does not know the"
    " NARVL_CLUSTER_SECRET of process 0"
  ]
  assert _SECRET not in "".join(said)


def test_process_0_without_the_secret(port):
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(_meet, port, 2, 0, timeout=1.0)
    answer = _meet(port, 2, 1, secret=_SECRET)
    assert "was started without NARVL_CLUSTER_SECRET, process 1" in answer
    first.result()


def test_a_program_that_poses_as_process_0(port):
  names = json.dumps({"names": ["a", "b"], "mac": "00"}).encode()
  _serve(port, _CHALLENGE, names + b"\n")
  answer = _meet(port, 2, 1, secret=_SECRET)
  assert answer.startswith(
    f"the program at 127.0.0.1:{port} does not know NARVL_CLUSTER_SECRET; "
  )


def test_the_secret_does_not_travel_and_no_message_can_be_used_again():
  line = messages.encode(_HELLO, _SECRET, "hello", "1", "2")
  assert _SECRET.encode() not in line
  hello = messages.decode(line)
  assert hello is not None
  assert messages.is_signed(hello, _SECRET, "hello", "1", "2")
  for context in (("hello", "3", "2"), ("answer", "1", "2"), ("hello",)):
    assert not messages.is_signed(hello, _SECRET, *context)
  changed = hello | {"process_id": 0}
  assert not messages.is_signed(changed, _SECRET, "hello", "1", "2")
  for mac in (None, 1, "", "\ud800", hello["mac"][:-1]):
    changed = hello | {"mac": mac}
    assert not messages.is_signed(changed, _SECRET, "hello", "1", "2")


def test_a_secret_that_can_be_guessed(port):
  answer = _meet(port, 2, 0, secret="1234")
  assert answer.startswith("NARVL_CLUSTER_SECRET has 4 characters, so it could")
  assert "1234" not in answer


def test_names_the_processes_it_waits_for(port, monkeypatch):
  monkeypatch.setattr(gathering, "_PROGRESS_SECONDS", 0.1)
  said: list[str] = []
  _meet(port, 12, 0, timeout=0.5, say=said.append)
  assert said[0] == (
    "still waiting for processes 1, 2, 3, 4, 5, 6, 7, 8 and 3 more"
  )


@pytest.mark.parametrize(
  ("address", "local"),
  [
    ("127.0.0.1:1", True),
    ("localhost:1", True),
    ("10.0.0.2:1", False),
    ("host0:1", False),
  ],
)
def test_what_is_local(address, local):
  assert rendezvous.is_local(address) == local


def test_a_local_coordinator_listens_to_this_machine_only():
  with rendezvous._listen("127.0.0.1:0") as listener:
    assert listener.getsockname()[0] == "127.0.0.1"
