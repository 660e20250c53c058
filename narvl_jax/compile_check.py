r"""Compiles a config for a TPU topology, on a machine without a TPU.

python -m narvl_jax.compile_check --config=configs/pod.py:base \
  --topology=v5e:16x16 [--num_slices=2] [--json=FILE] [--hlo=FILE]

Tells whether the train step fits into the memory of a chip, what it computes
and communicates, and how fast it could be at best. Nothing runs: seconds are
estimates. Needs `pip install "narvl_jax[aot]"`, no data and no vocabulary.
Exit code 3: it does not fit.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections.config_flags import config_flags

from narvl_jax.ahead_of_time.compile import (
  Check,
  advice,
  check_predict_step,
  check_train_step,
  predict_batch_size,
)
from narvl_jax.ahead_of_time.topology import get_topology
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import (
  check_json_path,
  check_output_file,
  write_report,
)
from narvl_jax.files.disk import write_text
from narvl_jax.parallel.mesh import describe
from narvl_jax.terminal import progress
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import show
from narvl_jax.training.setup import describe_parallelism

DOES_NOT_FIT_CODE = 3


def summary(check: Check, config_name: str) -> dict[str, Any]:
  """Returns what `--json` writes.

  Bytes of collectives are those of the whole arrays that a group gathers,
  sums or scatters, once per time that it does. What is not known, because the
  step does not fit or a bandwidth is not published, is None or empty.

  Args:
    check: of the train step.
    config_name: as it was typed.
  """
  program, memory = check.program, check.memory
  return {
    "config": config_name,
    "topology": check.topology.name,
    "num_slices": check.topology.num_slices,
    "chips": check.setup.mesh.size,
    "mesh": dict(check.setup.mesh.shape),
    "fits": memory.fits,
    "bytes_per_chip": {
      "arguments": memory.arguments,
      "temporaries": memory.temporaries,
      "total": memory.total,
      "limit": memory.limit,
    },
    "flops_per_chip": {
      "formula": check.formula_flops,
      "compiler": program.flops if program else None,
    },
    "collectives": {
      kind: {"count": count, "bytes": size}
      for kind, (count, size) in (program.by_kind() if program else {}).items()
    },
    "estimated_seconds": {
      "compute": check.compute_seconds,
      "communication": check.communication_seconds,
    },
    "compile_seconds": check.seconds,
  }


def report(check: Check) -> str:
  """Returns what is known of the train step, to read."""
  setup, chip = check.setup, check.topology.chip
  model = setup.experiment.model_config
  lines = [
    f"mesh           {describe(setup.mesh)}",
    f"model          {setup.num_parameters:,} parameters, {model.dtype.name}"
    f" activations, remat {model.remat}",
    f"batch          {describe_parallelism(setup)}",
    *_memory_lines(check),
  ]
  program = check.program
  if program is None:
    return "\n".join(lines)
  formula, compute = check.formula_flops, check.compute_seconds or 0.0
  lines += [
    f"operations     {formula / 1e12:.3f} TFLOP a chip by formula,"
    f" {program.flops / 1e12:.3f} in the compiled program (what remat computes"
    " again included)",
    "collectives    per step on one chip; bytes of the whole arrays",
  ]
  rows = [
    (kind, f"{count} x", f"{size / 1e6:.1f} MB")
    for kind, (count, size) in program.by_kind().items()
  ]
  if rows:
    lines.append(format_columns(rows, rule=False, indent="  "))
  inside, across = check.network_bytes()
  unseen = check.topology.num_slices > 1 and not across
  lines.append(
    f"  a chip receives {inside / 1e6:.1f} MB in rings within its slice, "
    + ("an unknown amount" if unseen else f"{across / 1e6:.1f} MB")
    + " from other slices"
  )
  least = check.communication_seconds
  lines.append(
    f"compute        {1e3 * compute:.1f} ms: {program.cycles:.4g} cycles at"
    f" {chip.clock / 1e9:g} GHz, the compiler's estimate, not a measurement"
  )
  if least is None:
    why = "what slices exchange is not in the text of the program"
    if not unseen:
      why = "no published bandwidth between slices"
    lines.append(f"communication  unknown: {why}")
  else:
    lines.append(
      f"communication  {1e3 * least:.1f} ms at least: bytes received over half"
      f" of the published {chip.ici_bandwidth / 1e9:.0f} GB/s of all links"
      + _between_slices(check)
    )
  lines.append(_utilisation_line(check, compute, least))
  return "\n".join(lines)


def _memory_lines(check: Check) -> list[str]:
  memory = check.memory
  share = 100 * memory.total / memory.limit
  lines = [
    f"bytes a chip   arguments {_gib(memory.arguments)}, temporaries"
    f" {_gib(memory.temporaries)}, total {_gib(memory.total)}:"
    f" {share:.0f} % of {_gib(memory.limit)}"
  ]
  if not memory.fits:
    over = memory.total - memory.limit
    flags_ = advice(check.setup, memory) or ["a larger --topology"]
    lines.append(f"DOES NOT FIT   by {_gib(over)}; try {' or '.join(flags_)}")
  return lines


def _between_slices(check: Check) -> str:
  bandwidth = check.topology.chip.dcn_bandwidth
  if not check.network_bytes()[1] or bandwidth is None:
    return ""
  return f", and {8 * bandwidth / 1e9:.0f} Gbit/s of a chip between slices"


def _utilisation_line(
  check: Check, compute: float, communication: float | None
) -> str:
  if not compute:
    return "MFU            the compiler gave no cycles"
  text = f"MFU            at most {100 * check.utilisation(compute):.1f} %"
  if communication is None:
    return text
  whole = 100 * check.utilisation(compute + communication)
  return f"{text}, {whole:.1f} % if nothing of the communication is hidden"


def _gib(count: int) -> str:
  return f"{count / 2**30:.2f} GiB"


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_config_flag()
  flags.DEFINE_string("topology", None, "CHIP:SHAPE, such as v5e:16x16.")
  flags.DEFINE_integer("num_slices", 1, "Slices of this topology.")
  common_flags.json()
  flags.DEFINE_string("hlo", None, "File to write the compiled program to.")
  flags.DEFINE_bool("predict", True, "Also compile the predict step.")
  flags.mark_flags_as_required(["config", "topology"])
  flags.declare_key_flag("config")  # Shown by --help.


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  # A program that was compiled ahead of time is written there but cannot be
  # read again, of which jax warns.
  jax.config.update("jax_enable_compilation_cache", False)
  name = config_flags.get_config_filename(flags.FLAGS["config"])
  run(flags.FLAGS, flags.FLAGS.config, name)


def run(settings: Any, config: Any, name: str) -> None:
  """Checks and prints; exits with code 3 if something does not fit.

  Args:
    settings: values of the flags but `config`.
    config: of the experiment.
    name: of the config, as it was typed.

  Raises:
    UserError: a flag or the config is wrong.
  """
  check_json_path(settings.json)
  if settings.hlo:
    check_output_file("hlo", settings.hlo)
  topology = get_topology(settings.topology, settings.num_slices)
  slices = "" if topology.num_slices == 1 else f" x {topology.num_slices}"
  show(f"train step of {name} for {topology.name}{slices}")
  with progress.doing("compiling the train step"):
    check = check_train_step(config, topology)
  show(report(check))
  show(f"compiled in {check.seconds:.1f} s")
  write_report(settings.json, summary(check, name))
  if settings.hlo and check.text:
    write_text(pathlib.Path(settings.hlo), check.text)
  for path in (settings.json, settings.hlo):
    if path and path != common_flags.STDOUT:
      show(f"wrote {path}")
  if not check.memory.fits:
    sys.exit(DOES_NOT_FIT_CODE)
  if not settings.predict:
    return
  with progress.doing("compiling the predict step"):
    predict = check_predict_step(check)
  show(f"predict step, batch {predict_batch_size(predict.setup)}")
  show("\n".join(_memory_lines(predict)))
  seconds = 1e3 * (predict.compute_seconds or 0.0)
  show(f"compute        {seconds:.1f} ms, the compiler's estimate")
  if not predict.memory.fits:
    sys.exit(DOES_NOT_FIT_CODE)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
