"""Which process wrote a file, and whether that process still runs."""

import contextlib
import pathlib
import socket


def machine() -> str:
  """Returns what processes that see each other share, "" if it is unknown.

  Host names are not enough: two containers may have the same one.
  """
  with contextlib.suppress(OSError):
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    space = pathlib.Path("/proc/self/ns/pid").readlink()
    return f"{socket.gethostname()} {boot} {space}"
  return ""


def process_start(pid: int) -> str | None:
  """Returns when a process was started, None if it is gone or unknown.

  A number of a process may be given again, but not with the same start.
  """
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  # The name, in brackets, may have spaces.
  fields = text.rpartition(")")[2].split()
  return None if fields[0] in "ZX" else fields[19]
