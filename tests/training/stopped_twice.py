"""A process that compiles, and is told twice to stop; argument: its folder.

It ends as `narvl_jax.train` does. With a second argument the second signal
comes while it writes down why it ends.
"""

import os
import pathlib
import signal
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from narvl_jax.command_line import cli
from narvl_jax.reliability import session as hosts
from narvl_jax.reliability.explain import explain_failure
from narvl_jax.reliability.guard import Guard
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run_folder import restarts as failures
from narvl_jax.terminal.text import show


def _compile(depth: int) -> None:
  """Compiles for seconds, without Python."""

  def deep(x: Any) -> Any:
    for i in range(depth):
      x = jnp.sin(x @ x) * (1.0 + i) + jnp.sort(x, axis=i % 2)
    return x

  jax.jit(deep).lower(jnp.ones((8, 8))).compile()


def _signal_while_it_ends() -> None:
  before = failures.record_end

  def record_end(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    before(*args, **kwargs)

  failures.record_end = record_end


def main(argv: Sequence[str]) -> None:
  """Compiles until it is stopped."""
  jax.config.update("jax_enable_compilation_cache", False)
  workdir, while_it_ends = pathlib.Path(argv[1]), len(argv) > 2
  workdir.mkdir(parents=True, exist_ok=True)
  if while_it_ends:
    _signal_while_it_ends()
  try:
    with Guard(workdir, Ledger(), leave=hosts.leave) as guard:
      guard.lock_folder(show)
      show("ready")
      if while_it_ends:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
      for depth in range(40, 1000):
        _compile(depth)
  except (KeyboardInterrupt, Exception) as error:
    hosts.end(error, *explain_failure(error, workdir))


if __name__ == "__main__":
  cli.run(main, positional=(1, 2))
