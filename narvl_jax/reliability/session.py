"""Output streams of each host, and one exit code for all hosts."""

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

from narvl_jax.command_line import cli
from narvl_jax.errors import UserError
from narvl_jax.files import side_files
from narvl_jax.files.schemes import StoreError
from narvl_jax.files.spool import Spool
from narvl_jax.hosts import distributed
from narvl_jax.hosts.cluster import Cluster
from narvl_jax.hosts.notices import Notices
from narvl_jax.reliability import interrupt
from narvl_jax.reliability.explain import stopped_code
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import escape, show


@contextlib.contextmanager
def together(
  cluster: Cluster | None,
  log_folder: pathlib.Path | None,
  facts: Callable[[], Mapping[str, str]],
  explain: Callable[[BaseException], tuple[int, str]],
  say: Callable[[str], None],
  on_end: Callable[[int, str], Any] = lambda code, message: None,
) -> Iterator[Notices | None]:
  """Connects the hosts; a failure of one ends all with its exit code.

  Args:
    cluster: the processes; None for a run of one process.
    log_folder: folder for `host_000.log` and so on; None: no logs.
    facts: returns values that must be equal on all hosts.
    explain: exception -> exit code and one line.
    on_end: see `Notices`.

  Yields:
    The notices between hosts; None for one process.

  Raises:
    UserError: the hosts cannot connect, or their facts differ.
  """
  if cluster is None:
    yield None
    return
  with _output(cluster.process_id, log_folder) as (terminal, log):
    try:
      distributed.initialize(cluster, facts(), say)
    except UserError as error:
      # The caller prints it on the terminal, once the streams are restored.
      show(escape(f"error: {error}"), file=log)
      raise
    with Notices(
      distributed.client(),
      cluster,
      terminal=terminal,
      leave=leave,
      on_end=on_end,
      explain=explain,
    ) as notices:
      stopped = None
      try:
        yield notices
      except SystemExit as stop:
        stopped = stop
      except BaseException as error:
        # The exit code is decided; a launcher's SIGTERM must not change it.
        interrupt.ignore_signals()
        if notices.ending:
          # A consequence of the other hosts leaving.
          notices.fail(1, "")
        notices.fail(*explain(error))
      distributed.barrier("end of the run")
    jax.distributed.shutdown()
  if stopped is not None:
    raise stopped


@contextlib.contextmanager
def outliving_terminal(folder: pathlib.Path | None) -> Iterator[None]:
  """Redirects output to a log once the terminal cannot be written.

  Args:
    folder: folder for `host_000.log`, created only then; None: the write fails.
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
  """Prints `message` on stderr and raises `SystemExit` with the code."""
  show(message, file=sys.stderr)
  if isinstance(error, KeyboardInterrupt):
    raise cli.Stopped(code or stopped_code())
  raise SystemExit(code)


def leave(code: int) -> NoReturn:
  """Ends the process at once; 0 means that a stop request was followed."""
  cli.leave(code or stopped_code())


@contextlib.contextmanager
def _output(
  process_id: int, folder: pathlib.Path | None
) -> Iterator[tuple[Any, TextIO]]:
  """Redirects the output of this process.

  The first host writes to its terminal and its log, the others to their logs
  only. Output of C++ libraries on stdout, such as Gloo's line about every
  connection, goes to the logs only.

  Yields:
    A stream to terminal and log on any host, and the log.
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


@contextlib.contextmanager
def _open_log(process_id: int, folder: pathlib.Path | None) -> Iterator[TextIO]:
  if folder is None:
    with open(os.devnull, "w", encoding="utf-8") as log:
      yield log
    return
  name = f"host_{process_id:03d}.log"
  try:
    side_files.make_way(folder, folder=True)
    spool = Spool(folder, [name])
    spool.folder.mkdir(parents=True, exist_ok=True)
    path = spool.folder / name
    side_files.make_way(path)
    log = path.open("a", encoding="utf-8", errors="backslashreplace")
  except OSError as error:
    raise UserError(
      f"the log of host {process_id} cannot be written in {folder}"
      f" ({error.strerror}); use another --workdir"
    ) from error
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  show(escape(f"--- {now} {' '.join(sys.argv)}"), file=log)
  try:
    with log:
      yield log
  finally:
    with contextlib.suppress(StoreError):
      spool.close()


def _duplicate(stack: contextlib.ExitStack, number: int, stream: Any) -> TextIO:
  """Opens a file descriptor again, with the encoding of its stream."""
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
  """Redirects absl's log, which keeps the stream of its start."""
  logging.get_absl_handler().python_handler.setStream(stream)


class _Tee(io.TextIOBase):
  """Writes to a terminal and a log, and drops a stream that fails.

  A full disk or a closed terminal does not end a run, unless there is no log.
  """

  def __init__(
    self,
    terminal: TextIO,
    log: TextIO | None = None,
    open_log: Callable[[], TextIO] | None = None,
  ) -> None:
    self._terminal = terminal
    self._streams = [terminal] if log is None else [terminal, log]
    self._kept = log is None or getattr(log, "name", "") != os.devnull
    self._open_log = open_log
    # Copied to a log that is opened in the middle of a line.
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
    """The terminal if it is the only stream, otherwise None."""
    return self._terminal if self._streams == [self._terminal] else None

  def close(self) -> None:
    """Does nothing: both streams belong to the caller.

    The base class would flush them from its finaliser, when they may already
    be closed.
    """

  def _each(self, action: Callable[[TextIO], Any]) -> None:
    """Applies `action` to every stream and drops those that fail."""
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
      # Otherwise its buffer fails once more when it is closed.
      with (
        contextlib.suppress(OSError, ValueError),
        open(os.devnull, "w") as nothing,
      ):
        os.dup2(nothing.fileno(), stream.fileno())

  def _opened_log(self, error: OSError) -> list[TextIO]:
    """Opens the log that replaces a terminal; empty if it cannot be opened."""
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
    """The most restrictive encoding of the streams."""
    names = [getattr(x, "encoding", None) or "utf-8" for x in self._streams]
    return next((x for x in names if x.lower() != "utf-8"), "utf-8")

  def fileno(self) -> int:
    return self._streams[0].fileno()

  def isatty(self) -> bool:
    return self._streams[0].isatty()
