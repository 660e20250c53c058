"""Identifies a process, to find out later whether it still runs."""

import contextlib
import pathlib
import socket


def machine() -> str:
  """Identifies the namespace of process ids; "" if unknown.

  Two containers may have the same host name.
  """
  with contextlib.suppress(OSError):
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    space = pathlib.Path("/proc/self/ns/pid").readlink()
    return f"{socket.gethostname()} {boot} {space}"
  return ""


def process_start(pid: int) -> str | None:
  """Returns the start time of a process; None if it has ended or is unknown.

  A process id may be reused, but not with the same start time.
  """
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  # The name, in parentheses, may contain spaces.
  fields = text.rpartition(")")[2].split()
  return None if fields[0] in "ZX" else fields[19]
