"""A run on several hosts: where each prints, and how all end together."""

import contextlib
import datetime
import io
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TextIO

import jax
from absl import logging

from narvl_jax.command_line.cli import Stopped, leave
from narvl_jax.errors import UserError
from narvl_jax.files import side_files
from narvl_jax.hosts import distributed
from narvl_jax.hosts.distributed import Cluster
from narvl_jax.hosts.notices import Notices
from narvl_jax.reliability import interrupt
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import escape, show

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
      explain=explain,
      lost_seconds=cluster.heartbeat_timeout,
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


@contextlib.contextmanager
def outliving_terminal(folder: pathlib.Path | None) -> Iterator[None]:
  """Lets a run of one process continue when its terminal is closed or full.

  What is printed from then on is in the log, as that of the first of several
  hosts always is.

  Args:
    folder: for `host_000.log`, which is made only then; None: the run ends.
  """
  if folder is None:
    yield
    return
  with contextlib.ExitStack() as stack:
    log: list[TextIO] = []

    def open_log() -> TextIO:
      if not log:
        log.append(stack.enter_context(_open_log(0, folder)))
      return log[0]

    streams = sys.stdout, sys.stderr
    sys.stdout = _Tee(sys.stdout, open_log=open_log)
    sys.stderr = _Tee(sys.stderr, open_log=open_log)
    _log_to(sys.stderr)
    try:
      yield
    finally:
      sys.stdout, sys.stderr = streams
      _log_to(sys.stderr)


def end(error: BaseException, code: int, message: str) -> NoReturn:
  """Ends a command after an error, with one line about it.

  Args:
    error: what ended the command.
    code: exit code.
    message: the line.

  Raises:
    SystemExit: always.
  """
  show(message, file=sys.stderr)
  raise (
    Stopped(code) if isinstance(error, KeyboardInterrupt) else SystemExit(code)
  )


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

  def __init__(
    self,
    terminal: TextIO,
    log: TextIO | None = None,
    open_log: Callable[[], TextIO] | None = None,
  ) -> None:
    """Takes the streams.

    Args:
      terminal: what the user sees.
      log: gets the same; None: nothing does, while the terminal lasts.
      open_log: opens the log that takes the place of the terminal.
    """
    self._terminal = terminal
    self._streams = [terminal] if log is None else [terminal, log]
    self._kept = log is None or getattr(log, "name", "") != os.devnull
    self._open_log = open_log
    # What a log that is opened now would lack.
    self._unflushed = ""

  def write(self, text: str) -> int:
    self._unflushed += text

    def put(stream: TextIO) -> None:
      stream.write(text)
      if "\n" in text:
        stream.flush()

    self._each(put)
    if "\n" in text:
      self._unflushed = ""
    return len(text)

  def flush(self) -> None:
    self._each(lambda stream: stream.flush())
    self._unflushed = ""

  @property
  def undivided(self) -> TextIO | None:
    """The terminal as long as nothing else gets what is written; or None."""
    return self._terminal if self._streams == [self._terminal] else None

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
      name = "terminal" if stream is self._terminal else "log"
      opened = [] if left else self._opened_log(error)
      left += opened
      if not left or (name == "terminal" and not self._kept):
        raise error
      self._streams = left
      left[0].write(f"note: no more {name}: {error.strerror}\n")
      for log in opened:
        log.write(self._unflushed)
      left[0].flush()
      # Else what it still holds fails once more when it is closed.
      with (
        contextlib.suppress(OSError, ValueError),
        open(os.devnull, "w") as nothing,
      ):
        os.dup2(nothing.fileno(), stream.fileno())

  def _opened_log(self, error: OSError) -> list[TextIO]:
    """Returns the log that is opened for a terminal; none if it cannot be."""
    if self._open_log is None:
      return []
    try:
      log = self._open_log()
    except UserError:
      return []
    self._open_log = None
    if self._terminal is sys.__stdout__ and sys.__stderr__ is not None:
      with contextlib.suppress(OSError, ValueError):
        show(
          f"note: stdout cannot be written ({error.strerror}); the run"
          f" continues, and prints into {log.name}",
          file=sys.__stderr__,
        )
    return [log]

  @property
  def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
    """What all streams can take."""
    names = [getattr(x, "encoding", None) or "utf-8" for x in self._streams]
    return next((x for x in names if x.lower() != "utf-8"), "utf-8")

  def fileno(self) -> int:
    return self._streams[0].fileno()

  def isatty(self) -> bool:
    return self._streams[0].isatty()
