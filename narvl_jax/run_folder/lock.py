"""The lock that allows one run at a time in a run folder."""

import contextlib
import datetime
import json
import operator
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from narvl_jax.errors import UserError
from narvl_jax.files import side_files
from narvl_jax.files.claims import claim
from narvl_jax.files.processes import machine, process_start
from narvl_jax.files.stores import is_remote

LOCK_FILE = "lock.json"
RENEW_SECONDS = 5.0
# Seconds without a sign of life after which a run is dead. The waiting process
# measures them, since the clocks of two machines may differ.
_STALE_SECONDS = 20.0
# In a store, a sign of life is several requests, repeated if they fail.
_STORE_RENEW_SECONDS = 15.0
_STORE_STALE_SECONDS = 90.0
# Constant, so that a sign of life needs no room on a full disk.
_SIZE = 1024
# Characters of a value in a lock; longer ones are damaged.
_LONGEST_TEXT = 300


class LockLost(UserError):
  """The folder no longer exists, or another run has taken it over."""


def now() -> str:
  """Returns the time in the format of the run's files."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def renew_seconds(workdir: pathlib.Path) -> float:
  """Returns the time between two signs of life of a run."""
  return _STORE_RENEW_SECONDS if is_remote(workdir) else RENEW_SECONDS


class RunLock:
  """`WORKDIR/lock.json`, which names the live run of a folder and its status.

  It is created atomically, so only one of two runs gets it. A run removes it at
  at its end; after a killed run, the next run takes it over.

  Attributes:
    in_store: whether the folder is in an object store.
  """

  def __init__(
    self, workdir: pathlib.Path, *, stale_seconds: float | None = None
  ) -> None:
    self._workdir = workdir
    self.in_store = is_remote(workdir)
    self._claim = claim(workdir / LOCK_FILE, 16 * _SIZE)
    usual = _STORE_STALE_SECONDS if self.in_store else _STALE_SECONDS
    self._stale_seconds = usual if stale_seconds is None else stale_seconds
    self._guard = threading.Lock()
    self._held = False
    self._contents: dict[str, Any] = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "machine": machine(),
      "process_start": process_start(os.getpid()),
      "id": uuid.uuid4().hex,
    }

  @property
  def since(self) -> str:
    """When the lock was acquired."""
    return self._contents["since"]

  def acquire(
    self,
    say: Callable[[str], Any],
    on_dead: Callable[[dict[str, Any]], Any] = lambda held: None,
    stage: str = "init",
  ) -> None:
    """Acquires the lock.

    Raises:
      UserError: another run is alive in the folder.
    """
    self._contents["since"] = now()
    while not self._create(stage):
      found = self._claim.read()
      if found is None:
        continue
      held = _parse(found)
      if self._is_dead(found, held, say) and self._take_over(found, stage):
        say(
          f"note: takes over from the run of {_who(held)}, which ended"
          f" unexpectedly ({_last_sign(held)})"
        )
        on_dead(held)
        return

  def renew(
    self, stage: str, step: int, account: Mapping[str, Any] | None = None
  ) -> None:
    """Writes a sign of life; errors of the disk are ignored.

    Args:
      account: time spent so far, see `times.record`.

    Raises:
      LockLost: the lock no longer exists, or belongs to another run.
    """
    with self._guard:
      if not self._held:
        return
      try:
        text = self._text(stage, step, account)
        if not self._claim.renew(text, self._is_own):
          raise LockLost(
            f"--workdir={self._workdir} was taken over by the run of"
            f" {_who(_parse(self._claim.read() or b''))}, since this one gave"
            " no sign of life; stop one of them"
          )
      except FileNotFoundError as error:
        raise LockLost(
          f"--workdir={self._workdir} or its {LOCK_FILE} no longer"
          " exists: nothing could be saved there; restore it, then run the"
          " same command again to resume"
        ) from error
      except OSError:
        pass

  def release(self) -> None:
    """Removes the lock if it still belongs to this run."""
    with self._guard:
      with contextlib.suppress(OSError):
        if self._held:
          self._claim.remove(self._is_own)
      self._held = False

  def _text(
    self, stage: str, step: int, account: Mapping[str, Any] | None = None
  ) -> bytes:
    values = {**self._contents, "time": now(), "phase": stage, "step": step}
    values |= account or {}
    return json.dumps(values).ljust(_SIZE - 1).encode() + b"\n"

  def _create(self, stage: str) -> bool:
    """Creates the lock; returns False if there is one."""
    self._held = self._claim.create(self._text(stage, 0))
    return self._held

  def _take_over(self, found: bytes, stage: str) -> bool:
    """Replaces the lock of a dead run, unless another run was faster."""
    self._held = self._claim.replace(found, self._text(stage, 0))
    return self._held

  def _is_own(self, text: bytes) -> bool:
    """Returns whether a possibly damaged lock belongs to this run."""
    own = self._contents["id"]
    found = _parse(text).get("id")
    if own.encode() in text or found is None:
      # Damaged beyond its id: `renew` writes it again.
      return True
    # A damaged bit changes one character; another id differs in most.
    same = sum(map(operator.eq, found, own))
    return same > len(own) // 2

  def _is_dead(
    self, found: bytes, held: dict[str, Any], say: Callable[[str], Any]
  ) -> bool:
    """Returns whether the holder of the lock is dead; False if it ended.

    A new sign of life means that it is alive. If it runs on this machine, its
    process decides, even if it is stuck.

    Raises:
      UserError: it is alive.
    """
    here = self._contents["machine"]
    near = bool(here) and held.get("machine") == here
    reported = False
    deadline = time.monotonic() + self._stale_seconds
    while True:
      current = self._claim.read()
      if current is None:
        return False
      if near and not is_running(held):
        return True
      if current != found:
        held = _parse(current)
        break
      if time.monotonic() > deadline:
        if near:
          break
        return True
      if not reported:
        say(
          f"{LOCK_FILE} is that of a run of {_who(held)}; waiting up to"
          f" {self._stale_seconds:g} s for a sign of life"
        )
        reported = True
      time.sleep(min(0.2, self._stale_seconds / 4))
    raise UserError(
      f"--workdir={self._workdir} is in use: a run of {_who(held)} is alive"
      f" ({_last_sign(held)}); stop it (kill {held.get('pid', '?')} on"
      f" {held.get('host', '?')}), or use another --workdir"
    )


def holder(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Returns the valid values of the lock of a run folder; None without one.

  They are those of `RunLock.renew`: "host", "pid", "since", "time", "phase",
  "step" and the account of the time.

  Raises:
    OSError: the file cannot be read.
  """
  path = workdir / LOCK_FILE
  try:
    return _parse(path.read_bytes()) if path.is_file() else None
  except FileNotFoundError:
    return None


def _parse(text: bytes) -> dict[str, Any]:
  """Returns the valid values of a lock."""
  held = side_files.parse_object(text) or {}
  kinds = {
    **dict.fromkeys(("pid", "step", "from_step", "updates"), int),
    "seconds": dict,
  }
  return {
    name: value
    for name, value in held.items()
    if isinstance(value, kinds.get(name, str)) and _is_short(value)
  }


def _is_short(value: int | str | dict[str, Any]) -> bool:
  """Returns whether a value is short enough to be genuine."""
  if isinstance(value, int):
    return 0 <= value < 1 << 63
  return len(value) <= _LONGEST_TEXT


def _who(held: dict[str, Any]) -> str:
  return (
    f"host {held.get('host', '?')}, process {held.get('pid', '?')}, since"
    f" {held.get('since', '?')}"
  )


def _last_sign(held: dict[str, Any]) -> str:
  return (
    f'last sign of life {held.get("time", "?")} in phase "'
    f'{held.get("phase", "?")}" at step {held.get("step", "?")}'
  )


def is_running(held: Mapping[str, Any]) -> bool:
  """Returns whether the holder of a lock runs on this machine."""
  start = process_start(held.get("pid", 0))
  return start is not None and start == held.get("process_start")
