"""Runs an entry point on many command lines with a single import.

    python -m tests.programs.fork_main MODULE < commands.json > results.json

Each command line runs in its own process, forked after the import. Flags, exit
codes and output are those of `python -m MODULE ARGUMENTS`.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback


def _run(module: str, arguments: list[str]) -> dict:
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    sys.stdout.flush()
    child = os.fork()
    if not child:
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      code = 1
      try:
        _main(module, arguments)
      except SystemExit as error:
        code = 0 if error.code is None else error.code
      except BaseException:
        traceback.print_exc()
      finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))
    _, status = os.waitpid(child, 0)
    texts = {}
    for name, file in (("stdout", out), ("stderr", err)):
      file.seek(0)
      texts[name] = file.read()
  return {"returncode": os.waitstatus_to_exitcode(status), **texts}


def _main(module: str, arguments: list[str]) -> None:
  entry = importlib.import_module(module)
  from narvl_jax.command_line import cli

  sys.argv = [module, *arguments]
  entry.define_flags()
  cli.run(entry.main)


if __name__ == "__main__":
  importlib.import_module(sys.argv[1])
  # The entry points import these late; none of them touches a device.
  importlib.import_module("grain")
  json.dump([_run(sys.argv[1], x) for x in json.load(sys.stdin)], sys.stdout)
