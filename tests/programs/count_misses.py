"""Runs a command and prints how many programs its cache had not stored."""

import atexit
import collections
import json
import runpy
import sys

import jax

_PREFIX = "/jax/compilation_cache/"
_counts: collections.Counter[str] = collections.Counter()


def _count(event: str, **_: object) -> None:
  if event.startswith(_PREFIX):
    _counts[event.removeprefix(_PREFIX)] += 1


if __name__ == "__main__":
  jax.monitoring.register_event_listener(_count)
  atexit.register(lambda: print(json.dumps(_counts), file=sys.stderr))
  sys.argv.pop(0)
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
