"""Commands under their old names."""

import runpy
import sys

from narvl_jax.terminal.text import show


def run_renamed(old: str, new: str) -> None:
  """Prints a note and runs `python -m narvl_jax.NEW`."""
  show(f"note: narvl_jax.{old} is now called narvl_jax.{new}", file=sys.stderr)
  runpy.run_module(f"narvl_jax.{new}", run_name="__main__", alter_sys=True)
