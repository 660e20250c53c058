"""Checks a train step for a topology and reports what it needs."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from narvl_jax.ahead_of_time.compile import (
  Check,
  check_predict_step,
  check_train_step,
  predict_batch_size,
)
from narvl_jax.ahead_of_time.costs import KERNEL_PEAK, Line
from narvl_jax.ahead_of_time.memory import advice
from narvl_jax.ahead_of_time.sources import Part, format_parts, split
from narvl_jax.ahead_of_time.topology import Chip, get_topology
from narvl_jax.command_line.flags import STDOUT
from narvl_jax.command_line.json_output import (
  check_json_path,
  check_output_file,
  write_report,
)
from narvl_jax.errors import list_few
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.files.disk import write_text
from narvl_jax.parallel.mesh import describe
from narvl_jax.terminal import progress
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import show
from narvl_jax.training.setup import describe_parallelism


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of a check.

  Attributes:
    topology: such as "v5e:16x16".
    num_slices: slices of this topology.
    json: file for the summary, `STDOUT` or None.
    hlo: file for the compiled program; not written if None.
    predict: also compile the predict step.
  """

  topology: str
  num_slices: int = 1
  json: str | None = None
  hlo: str | None = None
  predict: bool = True


def check_config(options: Options, config: Any, name: str) -> bool:
  """Compiles the steps of a config, prints reports and writes the files.

  Args:
    options: what to compile for, and what to write.
    config: config of the experiment.
    name: name of the config, as it was typed.

  Returns:
    Whether all that was compiled fits into the memory of a chip.

  Raises:
    UserError: an option or the config is wrong.
  """
  check_json_path(options.json)
  if options.hlo:
    check_output_file("hlo", options.hlo)
  topology = get_topology(options.topology, options.num_slices)
  slices = "" if topology.num_slices == 1 else f" x {topology.num_slices}"
  show(f"train step of {name} for {topology.name}{slices}")
  with progress.doing("compiling the train step"):
    check = check_train_step(config, topology)
  show(format_report(check))
  show(f"compiled in {check.seconds:.1f} s")
  write_report(options.json, summary(check, name))
  hlo = options.hlo if check.text else None
  if hlo:
    write_text(pathlib.Path(hlo), check.text)
  for path in (options.json, hlo):
    if path and path != STDOUT:
      show(f"wrote {path}")
  if not (check.memory.fits and options.predict):
    return check.memory.fits
  with progress.doing("compiling the predict step"):
    predict = check_predict_step(check)
  show(f"predict step, batch {predict_batch_size(predict.setup)}")
  show("\n".join(_memory_lines(predict)))
  seconds = 1e3 * (predict.compute_seconds or 0.0)
  show(f"compute        {seconds:.1f} ms, the compiler's estimate")
  return predict.memory.fits


def summary(check: Check, config_name: str) -> dict[str, Any]:
  """Returns the summary that `--json` writes.

  Bytes of a collective are those of the whole arrays that a group gathers,
  sums or scatters, times its executions. Unknown values are None or empty: the
  step does not fit, or a bandwidth is not published.

  Args:
    check: the checked train step.
    config_name: name of the config, as it was typed.
  """
  program, memory, chip = check.program, check.memory, check.topology.chip
  parts = split(program.lines, chip) if program else []
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
      "kernels": _seconds(program.kernels, chip) if program else None,
    },
    "hbm_bytes": program.hbm_bytes if program else None,
    "parts": [_part(part) for part in parts],
    "compile_seconds": check.seconds,
  }


def _part(part: Part) -> dict[str, Any]:
  passes = ("forward", "recomputed", "backward")
  return {
    "name": part.name,
    "seconds": {name: getattr(part, name) for name in passes},
    "flops": part.flops,
    "hbm_bytes": part.hbm_bytes,
  }


def _seconds(lines: Sequence[Line], chip: Chip) -> float:
  return sum(line.seconds(chip) for line in lines)


def format_report(check: Check) -> str:
  """Returns the report on a train step as text."""
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
    + _of_kernels(program.kernels, chip)
  )
  lines.append(
    f"HBM            {program.hbm_bytes / 1e9:.2f} GB a step, our estimate:"
    f" {1e3 * program.hbm_bytes / chip.hbm_bandwidth:.1f} ms at"
    f" {chip.hbm_bandwidth / 1e9:.0f} GB/s"
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
  if compute:
    chunked = _has_chunks(setup.experiment)
    lines += ["", format_parts(program.lines, chip, chunked=chunked)]
  return "\n".join(lines)


def _has_chunks(experiment: Experiment) -> bool:
  """Returns whether the loss computes its logits in chunks of classes."""
  chunk = experiment.config.loss.chunk_size
  classes = experiment.model_config.vocab_size
  return not experiment.autoregressive and 0 < chunk < classes


def _of_kernels(kernels: Sequence[Line], chip: Chip) -> str:
  if not kernels:
    return ""
  text = (
    f"; of it {1e3 * _seconds(kernels, chip):.1f} ms are our estimate of"
    f" {sum(line.count for line in kernels)} calls of Pallas kernels:"
    f" max(operations / ({KERNEL_PEAK:g} peak), bytes / bandwidth)"
  )
  blind = {line.name for line in kernels if line.blind}
  if blind:
    text += f", without the operations of {list_few(sorted(blind), 3)}"
  return text


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
    lines.append(
      f"DOES NOT FIT   by {_gib(over)}; try {', then '.join(flags_)}"
    )
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
