"""Times the two heads of the loss, from decoder states to all gradients.

  python -m narvl_jax.benchmarks.loss_head [--json=PATH]

The plain head computes the logits [B, N, V], and so does its gradient; the
chunked head makes them in chunks of classes, twice. Each computes the
objective and the gradients of the states [B, N, D] and the table [V, D].
`ratio` is the time over that of the plain head in the same round, `cpu ms` the
mean CPU time, which other programs disturb less. `temp` is XLA's temporary
memory; `peak` is by how much the resident memory of the process rose at most
while the head ran, results included (Linux only). The differences are those
from the plain head, relative to its loss and to the norm of its gradients.

Measured on one busy core with AVX-512, 2026-11: chunks took 0.6 to 1.1 times as
long at width 256 and 0.9 times at width 768 (one round), with 4 % and 8 % of
the temporary memory. Where [B, N, V] stays in the cache, the plain head is the
faster one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from narvl_jax.benchmarks import timing
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_json
from narvl_jax.errors import UserError
from narvl_jax.models import project
from narvl_jax.query_ctc import ChunkedLogits, query_ctc_objective

_PLAIN, _CHUNKED = "plain", "chunked"


@dataclasses.dataclass(frozen=True)
class HeadSizes:
  """One problem; the targets have `labels` labels, none beside its equal."""

  batch: int = 256
  num_queries: int = 20
  labels: int = 16
  width: int = 256
  vocab_size: int = 59458
  chunk_size: int = 4096
  dtype: str = "float32"

  def __post_init__(self) -> None:
    """Raises `UserError` for a problem that has no solution."""
    if self.labels > self.num_queries:
      raise UserError(
        f"{self.labels} labels do not fit {self.num_queries} queries; set"
        f" --labels to at most {self.num_queries}"
      )
    if self.labels >= self.vocab_size:
      raise UserError(
        f"{self.labels} different labels and blank need --vocab_size of at"
        f" least {self.labels + 1}, not {self.vocab_size}"
      )


def benchmark(sizes: HeadSizes, *, rounds: int) -> dict[str, Any]:
  """Measures both heads.

  Args:
    sizes: the problem.
    rounds: how often each is timed.

  Returns:
    What `--json` writes: times in milliseconds, memory in bytes.
  """
  args = _inputs(sizes)
  compiled = {
    name: _compile(sizes, chunk, args)
    for name, chunk in ((_PLAIN, 0), (_CHUNKED, sizes.chunk_size))
  }
  outputs, peaks = {}, {}
  # The smaller one first: what the other gives back may stay resident.
  for name in (_CHUNKED, _PLAIN):
    step = compiled[name]
    peaks[name], outputs[name] = timing.peak_memory(
      lambda step=step: jax.device_get(step(*args))
    )
  differences = _differences(outputs)
  del outputs
  timings = timing.measure(
    {name: lambda s=s: s(*args) for name, s in compiled.items()},
    rounds=rounds,
    calls=1,
  )
  results = {}
  for name, step in compiled.items():
    seconds, memory = timings[name].seconds, step.memory_analysis()
    results[name] = {
      "milliseconds": timing.spread(1e3 * seconds),
      "ratio": timing.spread(seconds / timings[_PLAIN].seconds),
      "cpu_milliseconds": 1e3 * timings[name].cpu_share * np.mean(seconds),
      "temp_bytes": memory.temp_size_in_bytes if memory else None,
      "output_bytes": memory.output_size_in_bytes if memory else None,
      "peak_bytes": peaks[name],
      **differences[name],
    }
  return {
    "benchmark": "loss_head",
    "sizes": dataclasses.asdict(sizes),
    "rounds": rounds,
    "logits_bytes": 4 * sizes.batch * sizes.num_queries * sizes.vocab_size,
    "environment": timing.environment(),
    "results": results,
  }


def _inputs(sizes: HeadSizes) -> tuple[jax.Array, ...]:
  """Returns states, table, labels and their lengths."""
  rng = np.random.default_rng(0)
  shape = (sizes.batch, sizes.num_queries, sizes.width)
  states = jnp.asarray(rng.standard_normal(shape, np.float32), sizes.dtype)
  table = rng.standard_normal((sizes.vocab_size, sizes.width), np.float32)
  # Logits of standard deviation 2.
  table *= 2 * sizes.width**-0.5
  start = rng.integers(sizes.vocab_size - 1, size=(sizes.batch, 1))
  labels = (start + 7 * np.arange(sizes.labels)) % (sizes.vocab_size - 1)
  lengths = jnp.full(sizes.batch, sizes.labels)
  return states, jnp.asarray(table), jnp.asarray(labels), lengths


def _compile(
  sizes: HeadSizes, chunk_size: int, args: tuple[jax.Array, ...]
) -> jax.stages.Compiled:
  """Compiles the objective, smoothed, with its gradients."""

  def objective(
    states: jax.Array, table: jax.Array, labels: jax.Array, lengths: jax.Array
  ) -> jax.Array:
    if chunk_size:
      logits = ChunkedLogits(states, table, chunk_size)
    else:
      logits = project(states, table)
    return query_ctc_objective(
      logits,
      labels,
      lengths,
      blank_id=sizes.vocab_size - 1,
      label_smoothing=0.1,
    )[0]

  step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))
  return step.lower(*args).compile()


def _differences(outputs: dict[str, Any]) -> dict[str, dict[str, float]]:
  """Relative differences of loss and gradients from the plain head."""
  loss, gradients = outputs[_PLAIN]
  found = {}
  for name, (other, others) in outputs.items():
    errors = [
      np.linalg.norm(np.float32(x) - np.float32(y))
      / np.linalg.norm(np.float32(y))
      for x, y in zip(others, gradients, strict=True)
    ]
    found[name] = {
      "loss_difference": float(abs(other - loss) / abs(loss)),
      "gradient_difference": float(max(errors)),
    }
  return found


def format_report(report: dict[str, Any]) -> str:
  """Returns the report as a table for people."""
  megabytes = timing.format_megabytes
  return timing.format_report(
    "states to gradients",
    report,
    {
      "cpu ms": lambda result: f"{result['cpu_milliseconds']:.1f}",
      "temp MB": lambda result: megabytes(result["temp_bytes"]),
      "peak MB": lambda result: megabytes(result["peak_bytes"]),
    },
  )


def define_flags() -> None:
  """Defines the flags of the command."""
  sizes = HeadSizes()
  common_flags.batch_size(
    "Examples at a time.", sizes.batch, old="batch", lower_bound=1
  )
  for name, text, least in (
    ("num_queries", "Queries of an example.", 1),
    ("labels", "Labels of an example.", 1),
    ("width", "Width of the decoder.", 1),
    ("vocab_size", "Classes, with blank.", 2),
    ("chunk_size", "Classes of a chunk.", 1),
  ):
    flags.DEFINE_integer(name, getattr(sizes, name), text, lower_bound=least)
  flags.DEFINE_enum(
    "dtype", sizes.dtype, ["float32", "bfloat16"], "Type of the states."
  )
  flags.DEFINE_integer("rounds", 5, "Rounds of measurement.", lower_bound=1)
  common_flags.json()


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  sizes = HeadSizes(
    batch=settings.batch_size,
    **{
      x.name: getattr(settings, x.name)
      for x in dataclasses.fields(HeadSizes)
      if x.name != "batch"
    },
  )
  check_json_path(settings.json)
  report = benchmark(sizes, rounds=settings.rounds)
  print(format_report(report), flush=True)
  write_json(settings.json, report)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
