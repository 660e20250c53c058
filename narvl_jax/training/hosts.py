"""A run on several hosts: where each prints, and how all end together."""

import contextlib
import datetime
import io
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
from absl import logging

from narvl_jax import progress, side_files
from narvl_jax.errors import UserError
from narvl_jax.parallel import distributed
from narvl_jax.parallel.distributed import Cluster
from narvl_jax.parallel.notices import Notices
from narvl_jax.terminal import escape, show
from narvl_jax.training import interrupt

LOG_FOLDER = "logs"


@contextlib.contextmanager
def together(
  cluster: Cluster | None,
  log_folder: pathlib.Path | None,
  facts: Callable[[], Mapping[str, str]],
  explain: Callable[[BaseException], tuple[int, str]],
  say: Callable[[str], None],
  on_end: Callable[[int, str], Any] = lambda code, message: None,
) -> Iterator[Notices | None]:
  """Connects the hosts; if the block fails on one, all end with its exit code.

  Args:
    cluster: the processes; with None nothing happens here.
    log_folder: for `host_000.log` and so on; None keeps no logs.
    facts: returns what must be the same on all hosts.
    explain: what ended the block -> exit code and one line.
    say: prints a line.
    on_end: see `Notices`.

  Yields:
    What the hosts tell each other.

  Raises:
    UserError: the hosts cannot connect or do not run the same.
  """
  if cluster is None:
    yield None
    return
  with _output(cluster.process_id, log_folder) as (terminal, log):
    try:
      distributed.initialize(cluster, facts(), say)
    except UserError as error:
      # The terminal gets it once the streams are its own again.
      show(escape(f"error: {error}"), file=log)
      raise
    with Notices(
      distributed.client(),
      cluster.process_id,
      cluster.num_processes,
      terminal=terminal,
      leave=leave,
      on_end=on_end,
    ) as notices:
      stopped = None
      try:
        yield notices
      except SystemExit as stop:
        stopped = stop
      except BaseException as error:
        # The end is decided: a launcher that stops all must not disturb it.
        interrupt.ignore_signals()
        if notices.ending:
          # What breaks now breaks since hosts leave, and is no news.
          notices.fail(1, "")
        notices.fail(*explain(error))
      distributed.barrier("end of the run")
    jax.distributed.shutdown()
  if stopped is not None:
    raise stopped


def leave(code: int) -> None:
  """Ends the process at once, whatever its threads are doing."""
  for child in multiprocessing.active_children():
    # What prepares its data would outlive it.
    child.terminate()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


@contextlib.contextmanager
def _output(
  process_id: int, folder: pathlib.Path | None
) -> Iterator[tuple[Any, TextIO]]:
  """Sends what is printed to where it belongs.

  The first host prints on its terminal and into its log, the others into
  their logs only. What libraries print on stdout below Python, such as Gloo's
  word about every connection, is only in the logs.

  Yields:
    A stream to terminal and log, whichever host this is, and the log.
  """
  with _open_log(process_id, folder) as log, contextlib.ExitStack() as stack:
    sys.stdout.flush()
    sys.stderr.flush()
    out = _duplicate(stack, 1, sys.stdout)
    err = _duplicate(stack, 2, sys.stderr)
    loud = _Tee(err, log)
    if process_id:
      stack.enter_context(progress.muted())
    numbers = [1]
    if process_id == 0:
      stack.callback(setattr, sys, "stdout", sys.stdout)
      stack.callback(setattr, sys, "stderr", sys.stderr)
      sys.stdout, sys.stderr = _Tee(out, log), loud
    elif folder is not None:
      numbers.append(2)
    for number in numbers:
      os.dup2(log.fileno(), number)
    _log_to(sys.stderr)
    try:
      yield loud, log
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      for number, stream in zip(numbers, (out, err), strict=False):
        os.dup2(stream.fileno(), number)
  _log_to(sys.stderr)


def _open_log(process_id: int, folder: pathlib.Path | None) -> TextIO:
  if folder is None:
    return open(os.devnull, "w", encoding="utf-8")
  path = folder / f"host_{process_id:03d}.log"
  try:
    side_files.make_way(folder, folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    side_files.make_way(path)
    log = path.open("a", encoding="utf-8", errors="backslashreplace")
  except OSError as error:
    raise UserError(
      f"the log of host {process_id} cannot be written in {folder}"
      f" ({error.strerror}); use another --workdir"
    ) from error
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  show(escape(f"--- {now} {' '.join(sys.argv)}"), file=log)
  return log


def _duplicate(stack: contextlib.ExitStack, number: int, stream: Any) -> TextIO:
  """Opens a terminal once more, in the encoding that it has."""
  return stack.enter_context(
    os.fdopen(
      os.dup(number),
      "w",
      buffering=1,
      encoding=getattr(stream, "encoding", None) or "utf-8",
      errors="backslashreplace",
    )
  )


def _log_to(stream: Any) -> None:
  """Has absl, which keeps the stream of its start, log to another one."""
  logging.get_absl_handler().python_handler.setStream(stream)


class _Tee(io.TextIOBase):
  """Writes to a terminal and to a log, as long as they take it.

  A run does not end because its disk is full or its terminal was closed. One
  that keeps no log ends as soon as nobody reads on.
  """

  def __init__(self, terminal: TextIO, log: TextIO) -> None:
    self._streams = [terminal, log]
    self._names = {terminal: "terminal", log: "log"}
    self._kept = getattr(log, "name", "") != os.devnull

  def write(self, text: str) -> int:
    def put(stream: TextIO) -> None:
      stream.write(text)
      if "\n" in text:
        stream.flush()

    self._each(put)
    return len(text)

  def flush(self) -> None:
    self._each(lambda stream: stream.flush())

  def close(self) -> None:
    """Does nothing: both streams belong to the caller.

    Python's finaliser calls it, when they may be closed already; that of the
    base class would flush them, and end in a traceback.
    """

  def _each(self, action: Callable[[TextIO], Any]) -> None:
    """Does something with every stream, and leaves out those that fail."""
    failed = {}
    for stream in self._streams:
      try:
        action(stream)
      except OSError as error:
        failed[stream] = error
    left = [stream for stream in self._streams if stream not in failed]
    for stream, error in failed.items():
      name = self._names[stream]
      if not left or (name == "terminal" and not self._kept):
        raise error
      self._streams = left
      left[0].write(f"note: no more {name}: {error.strerror}\n")
      left[0].flush()
      # Else what it still holds fails once more when it is closed.
      with (
        contextlib.suppress(OSError, ValueError),
        open(os.devnull, "w") as nothing,
      ):
        os.dup2(nothing.fileno(), stream.fileno())

  def fileno(self) -> int:
    return self._streams[0].fileno()

  def isatty(self) -> bool:
    return self._streams[0].isatty()
