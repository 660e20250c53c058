"""Runs pytest repeatedly in one folder with a single import of the libraries.

    cd FOLDER && python .../fork_pytest.py SECONDS [MODULE ...] < arguments

Each line of the input is a JSON list of pytest's arguments. They are used in a
process of their own, forked after the import of the modules, so that the
folder's code is imported again, and killed after SECONDS. The exit code is
printed as a line.
"""

import gc
import importlib
import json
import os
import signal
import sys
import traceback

import pytest

_NEW = os.O_CREAT | os.O_TRUNC | os.O_WRONLY


def _run(seconds: int, arguments: list[str]) -> int:
  child = os.fork()
  if not child:
    # The default action ends the process at once.
    signal.alarm(seconds)
    null, out = os.open(os.devnull, os.O_RDWR), os.open("output.txt", _NEW)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 1
    try:
      code = int(pytest.main(arguments))
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
  _, status = os.waitpid(child, 0)
  return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
  # As `python -m pytest` does; the program's own folder has no modules.
  sys.path[0] = os.getcwd()
  seconds, *modules = sys.argv[1:]
  for module in modules:
    importlib.import_module(module)
  assert not any(x.split(".")[0] == "narvl_jax" for x in sys.modules)
  gc.freeze()
  for line in sys.stdin:
    print(_run(int(seconds), json.loads(line)), flush=True)
