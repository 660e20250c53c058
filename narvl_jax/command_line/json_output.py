"""What `--json` writes: a file, or JSON alone on stdout."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from narvl_jax.command_line.flags import STDOUT
from narvl_jax.errors import UserError
from narvl_jax.files.disk import write_json
from narvl_jax.files.paths import check_file, check_possible
from narvl_jax.terminal.text import naming, readable_json

# Where JSON goes while what is for people goes to stderr.
_stdout: list[TextIO] = []


@contextlib.contextmanager
def reserved_stdout(path: str | None) -> Iterator[None]:
  """Keeps stdout for JSON within the block, if that is where it goes."""
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
    UserError: the folder is missing or cannot be written, or the path is one.
  """
  if path and path != STDOUT:
    check_output_file("json", path)


def check_output_file(flag: str, path: str) -> None:
  """Checks that a file can be written, before any work.

  Args:
    flag: that names it.
    path: its value.

  Raises:
    UserError: the folder is missing or cannot be written, or the path is one.
  """
  check_possible(f"--{flag}", path)
  target = pathlib.Path(path)
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
  """Writes a report where --json says: nowhere, to stdout or to a file."""
  if not path:
    return
  if path == STDOUT:
    out = _stdout[-1] if _stdout else sys.stdout
    with naming(out):
      out.write(readable_json(report, out.encoding, indent) + "\n")
      out.flush()
  else:
    write_json(pathlib.Path(path), report, indent=indent)
