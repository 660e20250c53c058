r"""Times NARVL against the official PyTorch code, with the same weights.

  python -m narvl_jax.benchmarks.reference --official=CHECKOUT \
    [--size=tiny,base] [--tasks=caption] [--json=PATH]

CHECKOUT is a clone of https://github.com/amazon-science/NARVL. It also needs
torch, in the same environment; without one of them, nothing is measured.

The official model gets its initial weights, and they are converted for ours.
First, the logits of both are compared. Then encoder, decoder (one pass and
arg-max), both together, and an update (loss, gradient, clipping, AdamW) are
timed in turns, in float32: ours, the official code as it is, and the official
code after `torch.compile`. `ratio` is the time over ours in the same round, and
`cpu ratio` that of the CPU time of the process, which other programs disturb
less. Results are in docs/performance.md.
"""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from narvl_jax.benchmarks import timing, workloads
from narvl_jax.benchmarks.official import checkout as checkout_lib
from narvl_jax.benchmarks.official import programs
from narvl_jax.benchmarks.official.programs import Calls
from narvl_jax.benchmarks.workloads import Workload, make_batch, make_experiment
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.interop import variables_from_official
from narvl_jax.models import SIZES
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import show

OPERATIONS = ("encoder", "decoder", "whole", "update")
_OURS, _EAGER, _COMPILED = "narvl_jax", "official", "official, compiled"


def benchmark(
  checkout: str,
  size: str,
  task: str,
  load: Workload,
  *,
  batch_size: int,
  rounds: int,
  operations: Sequence[str] = OPERATIONS,
  compiled: bool = True,
) -> dict[str, Any]:
  """Compares the logits, and measures the operations of one model.

  Args:
    checkout: of the official code.
    size: of the model.
    task: its task.
    load: sizes of the problem.
    batch_size: examples at a time.
    rounds: measurements of each.
    operations: some of `OPERATIONS`.
    compiled: also measure `torch.compile`.

  Returns:
    An entry of `--json`: differences of the logits, and milliseconds.
  """
  import torch

  torch.manual_seed(0)
  experiment = make_experiment(
    size,
    task,
    load,
    train__batch_size=batch_size,
    model__dropout=programs.DROPOUT,
    optimizer__name="adamw",
    optimizer__learning_rate=programs.LEARNING_RATE,
    optimizer__clip_norm=1.0,
  )
  vocabulary = experiment.vocabulary
  model = checkout_lib.build(
    checkout,
    size,
    queries=load.queries,
    vocab_size=vocabulary.size,
    dropout=programs.DROPOUT,
  )
  variables = jax.device_put(
    variables_from_official(
      {name: x.detach().numpy() for name, x in model.state_dict().items()},
      experiment.model_config,
    )
  )
  batch = make_batch(load, vocabulary.eos_id, batch_size, 0)
  labels = programs.make_labels(load, batch_size, vocabulary.eos_id)
  ours = programs.ours(experiment, task, variables, batch)
  official = programs.official(model.eval(), batch)
  facts = {"size": size, "task": task, "batch": batch_size, **vars(load)}
  difference, same = _difference(ours["logits"](), official["logits"]())
  facts |= {"logits_difference": difference, "same_answers": same}
  results: dict[str, Any] = {}
  notes: list[str] = []
  sides = {_OURS: ours, _EAGER: official}
  if compiled:
    sides[_COMPILED] = programs.official(model, batch, torch.compile)
  if "update" in operations:
    # Last, because it changes the weights of the official model.
    ours["update"] = programs.our_update(
      experiment, variables, task, batch, labels
    )
    blank_id = vocabulary.blank_id
    for name, compile_ in ((_EAGER, None), (_COMPILED, torch.compile)):
      if name in sides:
        sides[name]["update"] = programs.official_update(
          model, batch, labels, blank_id, compile_
        )
  for operation in operations:
    if operation == "update":
      model.train()
    calls = {name: side[operation] for name, side in sides.items()}
    results[operation] = _measure(operation, calls, rounds, notes)
  return {"facts": facts, "results": results, "notes": notes}


def _measure(
  operation: str, calls: Calls, rounds: int, notes: list[str]
) -> dict[str, Any]:
  """Times candidates in turn, without those that fail."""
  working: Calls = {}
  for name, call in calls.items():
    start = time.perf_counter()
    try:
      jax.block_until_ready(call())
    except Exception as error:  # The compiler of PyTorch raises many types.
      if name != _COMPILED:
        raise
      reason = str(error).strip().splitlines() or [type(error).__name__]
      notes.append(f"{operation}, {name}: failed: {reason[0][:200]}")
      continue
    working[name] = call
    seconds = time.perf_counter() - start
    show(f"  {operation}, {name}: first call {seconds:.1f} s")
  found = timing.measure(working, rounds=rounds, calls=1)
  base = found[_OURS]
  for name, x in found.items():
    show(
      f"  {operation}, {name}: {1e3 * np.median(x.cpu_seconds):.0f} ms of CPU"
    )
  return {
    name: {
      "milliseconds": timing.spread(1e3 * x.seconds),
      "cpu_milliseconds": timing.spread(1e3 * x.cpu_seconds),
      "ratio": timing.spread(x.seconds / base.seconds),
      "cpu_ratio": timing.spread(x.cpu_seconds / base.cpu_seconds),
    }
    for name, x in found.items()
  }


def _difference(ours: Any, official: np.ndarray) -> tuple[float, bool]:
  """Returns the largest difference over the largest logit; same arg-max."""
  ours = np.asarray(ours)[..., : official.shape[-1]]
  largest = np.abs(ours - official).max() / np.abs(official).max()
  return float(largest), bool((ours.argmax(-1) == official.argmax(-1)).all())


def format_report(report: Mapping[str, Any]) -> str:
  """Returns a table for every model and task."""
  parts = [timing.format_values(report["environment"])]
  for entry in report["entries"]:
    facts = dict(entry["facts"])
    difference, same = facts.pop("logits_difference"), facts.pop("same_answers")
    answers = "same answers" if same else "OTHER answers"
    rows = [("", "wall ms", "cpu ms", "ratio", "cpu ratio")]
    rows += [
      (
        f"{operation}, {name}",
        *(
          timing.format_spread(x[key], digits)
          for key, digits in (
            ("milliseconds", 0),
            ("cpu_milliseconds", 0),
            ("ratio", 2),
            ("cpu_ratio", 2),
          )
        ),
      )
      for operation, found in entry["results"].items()
      for name, x in found.items()
    ]
    parts += [
      "",
      timing.format_values(facts),
      f"logits differ by {difference:.0e} of the largest, {answers}",
      "",
      format_columns(rows),
      *entry["notes"],
    ]
  return "\n".join(parts)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("official", "", "Checkout of the official code.")
  flags.DEFINE_list("size", ["tiny"], "Sizes of the model.")
  flags.DEFINE_list("tasks", [], "Tasks; default: all.")
  flags.DEFINE_list("operations", list(OPERATIONS), "What is timed.")
  flags.DEFINE_integer(
    "image_size", None, "Pixels a side; default: the task's."
  )
  flags.DEFINE_bool("compiled", True, "Also time torch.compile.")
  common_flags.batch_size("Examples at a time.", 1, lower_bound=1)
  flags.DEFINE_integer("rounds", 5, "Rounds of measurement.", lower_bound=1)
  common_flags.json()


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  values = flags.FLAGS
  check_json_path(values.json)
  for name, known in (("size", SIZES), ("operations", OPERATIONS)):
    for value in getattr(values, name):
      if value not in known:
        raise UserError(
          f'--{name}: "{value}" is unknown.{did_you_mean(value, known)}'
        )
  loads = workloads.choose(values.tasks, values.image_size)
  reason = _missing(values.official)
  if reason:
    show(f"skipped: {reason}")
    return
  import torch

  entries = []
  for size in values.size:
    for task, load in loads.items():
      show(f"{size}, {task}")
      entries.append(
        benchmark(
          values.official,
          size,
          task,
          load,
          batch_size=values.batch_size,
          rounds=values.rounds,
          operations=values.operations,
          compiled=values.compiled,
        )
      )
  report = {
    "benchmark": "reference",
    "environment": {
      **timing.environment(),
      "torch": torch.__version__,
      "torch_threads": torch.get_num_threads(),
    },
    "rounds": values.rounds,
    "entries": entries,
  }
  show(format_report(report))
  write_report(values.json, report)


def _missing(checkout: str) -> str:
  """Returns why nothing can be measured, or ""."""
  if importlib.util.find_spec("torch") is None:
    return "torch is not installed (pip install torch)"
  if not checkout:
    return (
      "no official code (--official=CHECKOUT, a clone of"
      " https://github.com/amazon-science/NARVL)"
    )
  return ""


if __name__ == "__main__":
  define_flags()
  cli.run(main)
