"""Lines that describe a run: its data, its model and a dry run."""

from collections.abc import Mapping, Sequence
from typing import Any

from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run_folder.metrics import format_bytes
from narvl_jax.terminal import progress
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import escape, format_count, show
from narvl_jax.training.setup import Setup, describe_parallelism


class Announcer:
  """Prints lines with the seconds since the start."""

  def __init__(self, ledger: Ledger) -> None:
    self._ledger = ledger

  def __call__(self, text: str) -> None:
    """Prints a line."""
    show(f"[{self._ledger.elapsed():7.1f}s] {escape(text)}")


def describe_source(
  source: Sequence[Any], task: str, name: str, used: int, steps: int
) -> str:
  """Returns the size of a source and the part that a run uses."""
  size = (
    "endless" if is_endless(source) else format_count(len(source), "example")
  )
  text = f"source {name} for {task}: {size}; {steps} steps use {used:,}"
  if is_endless(source):
    return text
  return f"{text}, {_epochs(used / len(source))} epochs"


def _epochs(number: float) -> str:
  return f"{number:.2f}" if number < 100 else f"{number:,.0f}"


def used_table(
  mixture: Sequence[MixtureEntry], counters: Mapping[str, float]
) -> str:
  """Returns a table of the examples that training has used of each source."""
  rows = []
  for source, task, _, name in mixture:
    epochs = _epochs(counters[f"{name}/epochs"])
    rows.append(
      (
        escape(name),
        task,
        f"{counters[f'{name}/examples']:,.0f}",
        "endless" if is_endless(source) else epochs,
        f"{counters[f'{name}/bad']:,.0f}",
      )
    )
  head = ("source", "task", "examples", "epochs", "bad records")
  return format_columns([head, *rows], left=2)


def is_endless(source: Sequence[Any]) -> bool:
  """Returns whether a source generates records without end."""
  return bool(getattr(source, "endless", False))


def describe_model(setup: Setup, say: Announcer) -> None:
  """Prints the sizes of model and state and the split of a batch."""
  frozen = setup.num_frozen
  say(
    f"model {setup.num_parameters:,} parameters"
    + (f", {frozen:,} of them frozen" if frozen else "")
    + f"; state {format_bytes(setup.state_bytes_per_device)} per device"
  )
  if setup.teacher is not None:
    teacher = setup.teacher
    say(
      f"teacher {teacher.path}, step {teacher.step}:"
      f" {teacher.num_parameters:,} parameters,"
      f" {format_bytes(teacher.bytes_per_device)} per device"
    )
  say(describe_parallelism(setup))


def dry_run(
  setup: Setup, ledger: Ledger, say: Announcer, compiles: bool
) -> None:
  """Prints shapes, sharding and operations of the update.

  Args:
    setup: the run.
    ledger: measures the time of the compilation.
    say: prints a line.
    compiles: compile the update and print its memory. Otherwise it is only
      traced, which finds most mistakes within seconds.
  """
  show("batch:")
  rows = [
    (name, "x".join(map(str, spec.shape)), str(spec.dtype))
    for name, spec in setup.batch.items()
  ]
  show(format_columns(rows, left=3, rule=False, indent="  "))
  show(setup.parameter_table())
  show(setup.sharding_table())
  if compiles:
    say("compiling the step, which takes minutes for a large model")
    with ledger.stage("compile"), progress.doing("compiling the step"):
      memory: Any = setup.compile_step().memory_analysis()
    arguments = format_bytes(memory.argument_size_in_bytes)
    temporaries = format_bytes(memory.temp_size_in_bytes)
    say(f"memory per device: arguments {arguments}, temporaries {temporaries}")
  else:
    setup.trace_step()
    say("--dry_run=compile prints the memory of the update")
  say(f"{setup.step_flops():.3g} FLOPs per step; dry run, nothing was written")
