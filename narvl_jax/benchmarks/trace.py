"""Time of a traced update on a CPU, by part of the model.

  python -m narvl_jax.benchmarks.trace --from=RUN/traces/step_10
    --hlo=FOLDER/train_step.optimised.txt [--json=PATH]

Traces of a CPU name operations of the compiled program, which
`--config.debug.dump_hlo=FOLDER` writes. For TPUs and GPUs use xprof.
"""

import collections
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from jax.profiler import ProfileData

from narvl_jax.ahead_of_time import hlo
from narvl_jax.ahead_of_time.costs import op_name
from narvl_jax.ahead_of_time.sources import part_of
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.tables import format_columns

# Operations that run others, whose time would count twice.
_CONTAINERS = ("while", "call", "conditional", "async-start", "async-done")


def seconds_by_part(trace: bytes, program: str) -> dict[str, float]:
  """Returns the CPU time of each part of the model, the largest first.

  Args:
    trace: content of a file `.xplane.pb`.
    program: text of the compiled program, as `Compiled.as_text()` returns.
  """
  names = _operations(hlo.parse(program))
  seconds: collections.Counter[str] = collections.Counter()
  # jax's type of the statistics lacks a module (Python 3.13).
  warnings.filterwarnings("ignore", "builtin type", DeprecationWarning)
  for plane in ProfileData.from_serialized_xspace(trace).planes:
    for line in plane.lines:
      for event in line.events:
        name = names.get(str(dict(event.stats).get("hlo_op")))
        if name is not None:
          seconds[part_of(name)] += 1e-9 * event.duration_ns
  return dict(seconds.most_common())


def _operations(module: hlo.Module) -> dict[str, str]:
  """Returns the operation of the JAX program for each instruction.

  XLA drops the names of some fusions, such as gradients of convolutions. They
  get the name of what they contain, or of what reads them.
  """
  names = {}
  for instructions in module.computations.values():
    # The first one: instructions come before those that read them.
    reader: dict[str, str] = {}
    for i in reversed(instructions):
      name = op_name(i) or next(filter(None, _within(module, i)), "")
      names[i.name] = name = name or reader.get(i.name, "")
      if name:
        reader |= dict.fromkeys(i.operands, name)
  return {
    i.name: names[i.name]
    for instructions in module.computations.values()
    for i in instructions
    if i.opcode not in _CONTAINERS
  }


def _within(module: hlo.Module, i: hlo.Instruction) -> Iterator[str]:
  for called in i.called("calls"):
    yield from map(op_name, reversed(module.computations[called]))


def format_report(report: dict[str, Any]) -> str:
  """Returns the report as a table."""
  total = sum(report["seconds"].values())
  rows = [("part", "ms", "%")]
  rows += [
    (name, f"{1e3 * x:.1f}", f"{100 * x / total:.1f}")
    for name, x in report["seconds"].items()
  ]
  return format_columns([*rows, ("all", f"{1e3 * total:.1f}", "100.0")])


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("from", None, "Folder of a trace.")
  flags.DEFINE_string("hlo", None, "The optimised program of the update.")
  common_flags.json()
  flags.mark_flags_as_required(["from", "hlo"])


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  check_json_path(settings.json)
  folder: Any = settings["from"].value
  found = sorted(as_path(folder).rglob("*.xplane.pb"))
  if not found:
    raise UserError(
      f"--from={folder} has no trace (*.xplane.pb); make one with"
      " --config.profile.steps=5"
    )
  program = as_path(str(settings.hlo)).read_text(encoding="utf-8")
  seconds = seconds_by_part(found[0].read_bytes(), program)
  if not seconds:
    raise UserError(
      f"--from={folder} has no operation of --hlo={settings.hlo}; give the"
      " program of the same run, on a CPU"
    )
  report = {"trace": str(found[0]), "seconds": seconds}
  print(format_report(report), flush=True)
  write_report(settings.json, report)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
