"""Lists the commands, or runs one: `python -m narvl_jax COMMAND [flags]`.

After installation `narvl COMMAND [flags]` is equivalent, as is
`python -m narvl_jax.COMMAND [flags]`.
"""

import ast
import importlib.util
import pathlib
import runpy
import sys

from narvl_jax.command_line.cli import fail
from narvl_jax.errors import did_you_mean
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import show

# In the order in which a user needs them.
COMMANDS = (
  "train",
  "evaluate",
  "significance",
  "submission",
  "predict",
  "inspect",
  "report",
  "status",
  "calibrate",
  "checkpoints",
  "check_data",
  "convert_data",
  "list_answers",
  "document_frequencies",
  "distill",
  "compare",
  "convert",
  "compile_check",
)


def main() -> None:
  """Runs the command of the first argument.

  Without one, or with --help, prints the list of commands. An unknown command
  ends with exit code 2.
  """
  name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
  if name in ("-h", "-help", "--help", "help"):
    show(usage())
    return
  command = name.replace("-", "_")
  if command not in COMMANDS:
    fail(f'no command "{name}".{did_you_mean(command, COMMANDS)}')
  module = f"narvl_jax.{command}"
  sys.argv = [f"python -m {module}", *arguments]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def usage() -> str:
  """Returns the list of commands with the first lines of their docstrings."""
  rows = [(name, _summary(name)) for name in COMMANDS]
  return "\n".join(
    [
      "usage: narvl COMMAND [flags], or python -m narvl_jax.COMMAND [flags]",
      "",
      format_columns(rows, left=2, rule=False, indent="  ", width=sys.maxsize),
      "",
      "narvl COMMAND --help lists the flags of a command.",
    ]
  )


def _summary(name: str) -> str:
  """Returns the first line of a module's docstring, without importing it."""
  spec = importlib.util.find_spec(f"narvl_jax.{name}")
  assert spec is not None
  assert spec.origin is not None
  source = pathlib.Path(spec.origin).read_text(encoding="utf-8")
  docstring = ast.get_docstring(ast.parse(source)) or ""
  return docstring.partition("\n")[0]


if __name__ == "__main__":
  main()
