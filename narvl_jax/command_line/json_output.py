"""The output of `--json`: a file, or nothing but JSON on stdout."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from narvl_jax.command_line.flags import STDOUT
from narvl_jax.errors import UserError
from narvl_jax.files.disk import write_json
from narvl_jax.files.paths import check_file, check_possible
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.text import naming, readable_json

# The real stdout while sys.stdout is redirected to stderr.
_stdout: list[TextIO] = []


@contextlib.contextmanager
def reserved_stdout(path: str | None) -> Iterator[None]:
  """Redirects messages to stderr within the block if JSON goes to stdout."""
  if path != STDOUT:
    yield
    return
  _stdout.append(sys.stdout)
  try:
    with contextlib.redirect_stdout(sys.stderr):
      yield
  finally:
    _stdout.pop()


def check_json_path(path: str | None) -> None:
  """Checks that the file of --json can be written, before any work.

  Raises:
    UserError: the path is a folder, or its folder is missing or read-only.
  """
  if path and path != STDOUT:
    check_output_file("json", path)


def check_output_file(flag: str, path: str) -> None:
  """Checks that a file can be written, before any work.

  Args:
    flag: name of the flag, without dashes.
    path: value of the flag.

  Raises:
    UserError: the path is a folder, or its folder is missing or read-only.
  """
  check_possible(f"--{flag}", path)
  target = as_path(path)
  if target.is_dir():
    raise UserError(f'--{flag}="{path}" is a folder; give a file in it')
  if not target.parent.is_dir():
    raise UserError(
      f'--{flag}="{path}": there is no folder "{target.parent}"; create it'
      " first"
    )
  check_file(f"--{flag}", path)


def write_report(
  path: str | None, report: Mapping[str, Any], *, indent: int | None = 2
) -> None:
  """Writes a report to the destination of --json: none, stdout or a file."""
  if not path:
    return
  if path == STDOUT:
    out = _stdout[-1] if _stdout else sys.stdout
    with naming(out):
      out.write(readable_json(report, out.encoding, indent) + "\n")
      out.flush()
  else:
    write_json(as_path(path), report, indent=indent)
