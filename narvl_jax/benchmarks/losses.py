"""Flags, labels and report of the two benchmarks of the loss.

`sizes` is a dataclass with batch, num_queries, labels, vocab_size and dtype;
its other fields are in `_TEXTS`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from narvl_jax.benchmarks import timing
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.errors import UserError
from narvl_jax.terminal.tables import format_columns

_TEXTS = {
  "num_queries": ("Queries of an example.", 1),
  "labels": ("Labels of an example.", 1),
  "width": ("Width of the decoder.", 1),
  "vocab_size": ("Classes, with blank.", 2),
  "chunk_size": ("Classes of a chunk.", 1),
}


def check_labels(sizes: Any) -> None:
  """Raises UserError for targets that the queries cannot express."""
  if sizes.labels > sizes.num_queries:
    raise UserError(
      f"{sizes.labels} labels do not fit {sizes.num_queries} queries; set"
      f" --labels to at most {sizes.num_queries}"
    )
  if sizes.labels >= sizes.vocab_size:
    raise UserError(
      f"{sizes.labels} different labels and blank need --vocab_size of at"
      f" least {sizes.labels + 1}, not {sizes.vocab_size}"
    )


def make_labels(sizes: Any, rng: np.random.Generator) -> np.ndarray:
  """Returns int [batch, labels]; neighbours differ, so no blank is needed."""
  start = rng.integers(sizes.vocab_size - 1, size=(sizes.batch, 1))
  return (start + 7 * np.arange(sizes.labels)) % (sizes.vocab_size - 1)


def make_report(
  name: str,
  sizes: Any,
  *,
  rounds: int,
  outputs: Mapping[str, tuple[Any, Sequence[Any]]],
  timings: Mapping[str, timing.Timing],
  facts: Mapping[str, Mapping[str, Any]],
  versions: Mapping[str, str],
) -> dict[str, Any]:
  """Returns the report, in which the first candidate is the reference.

  Args:
    name: of the benchmark.
    sizes: of the problem.
    rounds: of the measurement.
    outputs: candidate -> loss and gradients.
    timings: candidate -> times.
    facts: candidate -> other results.
    versions: of libraries, besides JAX.
  """
  reference = next(iter(outputs))
  results = {}
  for label, (loss, gradients) in outputs.items():
    seconds = timings[label].seconds
    expected, others = outputs[reference]
    errors = [
      np.linalg.norm(np.float32(x) - np.float32(y))
      / np.linalg.norm(np.float32(y))
      for x, y in zip(gradients, others, strict=True)
    ]
    results[label] = {
      "milliseconds": timing.spread(1e3 * seconds),
      "ratio": timing.spread(seconds / timings[reference].seconds),
      **facts[label],
      "loss_difference": float(abs(loss - expected) / abs(expected)),
      "gradient_difference": float(max(errors)),
    }
  return {
    "benchmark": name,
    "sizes": dataclasses.asdict(sizes),
    "rounds": rounds,
    "logits_bytes": np.dtype(np.float32).itemsize
    * (sizes.batch * sizes.num_queries * sizes.vocab_size),
    "environment": {**timing.environment(), **versions},
    "results": results,
  }


def format_report(
  title: str,
  report: Mapping[str, Any],
  columns: Mapping[str, Callable[[Mapping[str, Any]], str]],
) -> str:
  """Returns the report as text.

  Args:
    title: what was timed.
    report: of `make_report`.
    columns: heading -> cell of a result; these columns precede the differences.
  """
  head = ["", "ms, median (min..max)", "ratio", *columns]
  rows = [[*head, "loss diff", "grad diff"]]
  rows += [
    [
      name,
      timing.format_spread(result["milliseconds"]),
      timing.format_spread(result["ratio"], 2),
      *(column(result) for column in columns.values()),
      f"{result['loss_difference']:.0e}",
      f"{result['gradient_difference']:.0e}",
    ]
    for name, result in report["results"].items()
  ]
  logits = timing.format_megabytes(report["logits_bytes"])
  return "\n".join(
    [
      *timing.format_facts(title, report),
      f"logits {logits} MB",
      "",
      format_columns(rows),
    ]
  )


def define_flags(sizes: Any, rounds: int) -> None:
  """Defines a flag for each size.

  Args:
    sizes: the defaults.
    rounds: default of --rounds.
  """
  common_flags.batch_size(
    "Examples at a time.", sizes.batch, old="batch", lower_bound=1
  )
  for name, (text, least) in _TEXTS.items():
    if hasattr(sizes, name):
      default = getattr(sizes, name)
      flags.DEFINE_integer(name, default, text, lower_bound=least)
  flags.DEFINE_enum(
    "dtype", sizes.dtype, ["float32", "bfloat16"], "Type of the inputs."
  )
  flags.DEFINE_integer(
    "rounds", rounds, "Rounds of measurement.", lower_bound=1
  )
  common_flags.json()


def run(
  make_sizes: Callable[..., Any],
  benchmark: Callable[..., dict[str, Any]],
  describe: Callable[[dict[str, Any]], str],
) -> None:
  """Runs the command: measures, prints and writes the report."""
  settings = flags.FLAGS
  names = [name for name in (*_TEXTS, "dtype") if name in settings]
  sizes = make_sizes(
    batch=settings.batch_size, **{name: settings[name].value for name in names}
  )
  check_json_path(settings.json)
  report = benchmark(sizes, rounds=settings.rounds)
  print(describe(report), flush=True)
  write_report(settings.json, report)
