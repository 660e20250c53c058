"""What a command does not import to print its help."""

import json
import subprocess
import sys

import pytest

from narvl_jax.interop.adapt import BLANK_ROWS

_HEAVY = (
  "jax",
  "flax",
  "optax",
  "orbax.checkpoint",
  "grain",
  "tensorflow_datasets",
)
_PROGRAM = """
import json, runpy, sys
try:
  runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
except SystemExit:
  pass
print(json.dumps([*sys.modules]))
"""


@pytest.mark.parametrize(
  "command",
  [
    "train",
    "checkpoints",
    "check_data",
    "compare",
    "distill",
    "compile_check",
    "convert",
    "convert_data",
    "list_answers",
  ],
)
def test_help_imports_nothing_heavy(command: str):
  result = subprocess.run(
    [sys.executable, "-c", _PROGRAM, f"narvl_jax.{command}", "--help"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert "Flags:" in result.stdout
  imported = json.loads(result.stdout.splitlines()[-1])
  assert not set(_HEAVY) & set(imported)


def test_help_of_convert_lists_every_blank_row():
  result = subprocess.run(
    [sys.executable, "-m", "narvl_jax.convert", "--help"],
    capture_output=True,
    text=True,
    check=True,
  )
  first, second, last = BLANK_ROWS
  assert f"{first}, {second} or {last}" in result.stdout
