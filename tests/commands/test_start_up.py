"""Modules that a command does not import to print its help."""

import json
import subprocess
import sys

import pytest

from narvl_jax.__main__ import COMMANDS
from narvl_jax.interop.adapt import BLANK_ROWS

_HEAVY = {
  *("jax", "flax", "optax", "orbax", "grain"),
  *("tensorflow", "tensorflow_datasets", "torch"),
}
_PROGRAM = """
import json, runpy, sys
try:
  runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
except SystemExit:
  pass
print(json.dumps([*sys.modules]))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str):
  result = subprocess.run(
    [sys.executable, "-c", _PROGRAM, f"narvl_jax.{command}", "--help"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert "Flags:" in result.stdout
  imported = json.loads(result.stdout.splitlines()[-1])
  assert not _HEAVY & {name.partition(".")[0] for name in imported}


def test_help_of_convert_lists_every_blank_row():
  result = subprocess.run(
    [sys.executable, "-m", "narvl_jax.convert", "--help"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert f"--blank_row={'|'.join(BLANK_ROWS)}\n" in result.stdout
