"""How processes find each other: all here, missing, twice, and strangers."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from narvl_jax.errors import UserError
from narvl_jax.parallel import rendezvous
from narvl_jax.parallel.comparison import describe_differences


@pytest.fixture
def port(monkeypatch) -> int:
  monkeypatch.setattr(rendezvous, "_POLL_SECONDS", 0.02)
  monkeypatch.setattr(rendezvous, "_HELLO_SECONDS", 1.0)
  monkeypatch.setattr(rendezvous, "_GRACE_SECONDS", 2.0)
  return rendezvous._free_port()


def _meet(port: int, count: int, index: int, **changes: Any) -> Any:
  """Returns the names, or the message of the error."""
  settings: dict[str, Any] = {
    "timeout": 20.0,
    "compare": describe_differences,
    "say": lambda _: None,
    **changes,
  }
  facts = settings.pop("facts", {"version jax": "1"})
  try:
    return rendezvous.meet(f"127.0.0.1:{port}", count, index, facts, **settings)
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
    "processes 1, 3 did not come within 0.7 s, of 4: "
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


def test_says_whom_it_waits_for(port, monkeypatch):
  monkeypatch.setattr(rendezvous, "_PROGRESS_SECONDS", 0.1)
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
