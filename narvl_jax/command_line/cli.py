"""Runs a command: parses flags and reports each mistake as one line."""

import contextlib
import gc
import glob
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from narvl_jax.command_line import compilation_cache
from narvl_jax.command_line.config_names import resolve_names
from narvl_jax.command_line.flag_parsing import normalise, print_help
from narvl_jax.command_line.json_output import reserved_stdout
from narvl_jax.command_line.messages import (
  check_config_files,
  config_file_message,
  flag_message,
  memory_message,
  unexpected_argument,
  unknown_key,
)
from narvl_jax.errors import USER_ERROR_CODE, UserError
from narvl_jax.files import paths as user_paths
from narvl_jax.files.disk_errors import explain_disk
from narvl_jax.files.spool import sync_all
from narvl_jax.terminal.text import WarningFormatter, naming, show, show_error

# Time limit for a store to take logs and metrics at the end.
_LAST_COPY_SECONDS = 20.0


def define_config_flag(name: str = "config") -> flags.FlagHolder[Any]:
  """Defines `--config=NAME|FILE.py[:ARG]` with one override flag per key."""
  return config_flags.DEFINE_config_file(
    name,
    None,
    "Experiment: the NAME of a config, or FILE.py; ARG is passed to"
    " get_config.",
  )


# Settings of libtpu: no query to the metadata server, no logs.
LIBTPU_WITHOUT_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_LOG_DIR": "disabled",
}


class Stopped(SystemExit):
  """Raised when a signal has ended a command and its clean-up is done."""


def leave(code: int) -> NoReturn:
  """Ends the process at once, even if threads are running."""
  for child in multiprocessing.active_children():
    # Otherwise data workers would outlive the process.
    child.terminate()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  sync_all(_LAST_COPY_SECONDS)
  os._exit(code)


def run(
  main: Callable[[Sequence[str]], Any],
  *,
  positional: int | tuple[int, int] = 0,
  positional_name: str = "",
) -> NoReturn:
  """Parses the flags, runs `main` and exits.

  Mistakes of the user (`UserError`, unknown flags and config keys, values of
  the wrong type, missing files) become one line on stderr and exit code 2.

  Args:
    main: called with the name of the command and its positional arguments.
    positional: number of positional arguments, or the least and the most.
    positional_name: their name in messages.
  """
  # Tracing creates many long-lived objects; garbage collection at the default
  # threshold (700) takes a tenth of the time of a short run.
  gc.set_threshold(100_000, 20, 100)
  least, most = (
    (positional, positional) if isinstance(positional, int) else positional
  )

  def guarded(argv: Sequence[str]) -> Any:
    if not flags.FLAGS["verbosity"].present:
      # At the default level libraries log every file that they access.
      logging.set_verbosity(logging.WARNING)
    try:
      given = argv[1:]
      if "" in given:
        raise UserError("an argument is empty; give a name, or leave it out")
      if len(given) > most:
        raise UserError(unexpected_argument(given[most], sys.argv))
      if len(given) < least:
        raise UserError(
          f"{positional_name or 'an argument'} is missing; see --help"
        )
      # Not all commands have these flags.
      if "compilation_cache" in flags.FLAGS:
        compilation_cache.enable(flags.FLAGS["compilation_cache"].value)
      json = flags.FLAGS["json"].value if "json" in flags.FLAGS else None
      with reserved_stdout(json):
        try:
          return main(argv)
        finally:
          # Otherwise Python prints the error as a traceback when it ends.
          with naming(sys.stdout):
            sys.stdout.flush()
    except UserError as error:
      fail(str(error))
    except KeyboardInterrupt:
      show("SIGINT: stopped", file=sys.stderr)
      raise Stopped(128 + signal.SIGINT) from None
    except BrokenPipeError:
      _drop_stdout()
      sys.exit(1)
    except Exception as error:
      text = explain_disk(error) or user_paths.explain_path(error)
      text = text or memory_message(error)
      if text is None:
        raise
      fail(text)

  _open_closed_streams()
  _quiet_libtpu()
  logging.get_absl_handler().setFormatter(WarningFormatter())
  # A traceback may quote the content of a file.
  sys.excepthook = show_error
  sys.argv[:] = resolve_names(normalise(sys.argv))
  try:
    if print_help(main, sys.argv):
      sys.exit(0)
  except BrokenPipeError:
    _drop_stdout()
    sys.exit(0)
  except UserError as error:
    fail(str(error))
  try:
    app.run(guarded, flags_parser=_parse_flags)
  except SystemExit as stop:
    if stop.code in (0, None) and not isinstance(stop, Stopped):
      raise
    # A signal or an error may have interrupted a compilation or a restore.
    # Threads of libraries that still run when the interpreter ends can abort
    # the process, which hides the exit code.
    leave(stop.code if isinstance(stop.code, int) else int(bool(stop.code)))
  except Exception as error:
    show_error(type(error), error, error.__traceback__)
    leave(1)
  raise AssertionError("app.run returned")


def fail(message: str) -> NoReturn:
  """Prints `error: MESSAGE` as one line on stderr; exits with code 2."""
  try:
    sys.stdout.flush()
  except OSError:
    _drop_stdout()
  with contextlib.suppress(OSError, UserError):
    show("error: " + " ".join(message.split()), file=sys.stderr)
  sys.exit(USER_ERROR_CODE)


def _drop_stdout() -> None:
  """Discards buffered output, because the reader has ended (`| head`)."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
  """Discards the output to a stream that the caller has closed (`>&-`).

  Otherwise the next opened file gets its descriptor, and with it the output.
  """
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(number)
    except OSError:
      # This takes the lowest free descriptor: that of the closed stream.
      os.open(os.devnull, os.O_RDWR)
    if getattr(sys, name) is None:
      mode = "w" if number else "r"
      stream = os.fdopen(number, mode, closefd=False)
      setattr(sys, name, stream)


def _quiet_libtpu() -> None:
  """Keeps libtpu from printing that a machine without a TPU has none.

  It is installed to compile for a TPU (`narvl_jax[aot]`). Variables that are
  set, and machines with device files of a TPU, are left alone.
  """
  if any(glob.glob(x) for x in ("/dev/accel*", "/dev/vfio/[0-9]*")):
    return
  for name, value in LIBTPU_WITHOUT_TPU.items():
    os.environ.setdefault(name, value)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    remaining = flags.FLAGS(list(argv))
    user_paths.check_flags()
    check_config_files()
    return remaining
  except (flags.Error, UserError) as error:
    fail(flag_message(error, argv))
  except Exception as error:
    # config_flags does not convert these: an override of an unknown key, and
    # errors that a config file raises.
    fail(unknown_key(argv) or config_file_message(error))
