"""Times the heads of the loss, from decoder states to all gradients.

  python -m narvl_jax.benchmarks.loss_head [--json=PATH]

The plain head computes the logits [B, N, V] and their gradient. The chunked
head computes them in parts. `optax.ctc_loss` is the plain head with the loss of
optax over all classes. All compute the objective, with label smoothing, and the
gradients of the states [B, N, D] and the table [V, D].

`ratio` is the time over that of the plain head in the same round; `cpu ms` the
mean CPU time, which other programs disturb less; `temp` XLA's temporary
memory; `peak` the peak of resident memory above its start, with the results
(Linux only). The differences are relative to the plain head. Results are in
docs/performance.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from narvl_jax.benchmarks import losses, timing
from narvl_jax.command_line import cli
from narvl_jax.models import project
from narvl_jax.query_ctc import ChunkedLogits, query_ctc_objective

_PLAIN, _CHUNKED, _OPTAX = "plain", "chunked", "optax.ctc_loss"
_SMOOTHING = 0.1


@dataclasses.dataclass(frozen=True)
class HeadSizes:
  """One problem; the labels of a target are all different."""

  batch: int = 256
  num_queries: int = 20
  labels: int = 16
  width: int = 256
  vocab_size: int = 59458
  chunk_size: int = 4096
  dtype: str = "float32"

  def __post_init__(self) -> None:
    """Raises UserError for a problem without solution."""
    losses.check_labels(self)


def benchmark(sizes: HeadSizes, *, rounds: int) -> dict[str, Any]:
  """Measures all heads.

  Args:
    sizes: the problem.
    rounds: number of measurements of each.

  Returns:
    The content of `--json`: times in milliseconds, memory in bytes.
  """
  args = _inputs(sizes)
  compiled = {
    name: _compile(sizes, name, args) for name in (_PLAIN, _CHUNKED, _OPTAX)
  }
  outputs, peaks = {}, {}
  # The smallest one first: memory that the others release may stay resident.
  for name in (_CHUNKED, _PLAIN, _OPTAX):
    step = compiled[name]
    peaks[name], outputs[name] = timing.peak_memory(
      lambda step=step: jax.device_get(step(*args))
    )
  timings = timing.measure(
    {name: lambda s=s: s(*args) for name, s in compiled.items()},
    rounds=rounds,
    calls=1,
  )
  facts = {}
  for name, step in compiled.items():
    found, memory = timings[name], step.memory_analysis()
    facts[name] = {
      "cpu_milliseconds": 1e3 * found.cpu_share * np.mean(found.seconds),
      "temp_bytes": memory.temp_size_in_bytes if memory else None,
      "output_bytes": memory.output_size_in_bytes if memory else None,
      "peak_bytes": peaks[name],
    }
  return losses.make_report(
    "loss_head",
    sizes,
    rounds=rounds,
    outputs={name: outputs[name] for name in compiled},
    timings=timings,
    facts=facts,
    versions={"optax": optax.__version__},
  )


def _inputs(sizes: HeadSizes) -> tuple[jax.Array, ...]:
  """Returns states, table, labels and their lengths."""
  rng = np.random.default_rng(0)
  shape = (sizes.batch, sizes.num_queries, sizes.width)
  states = jnp.asarray(rng.standard_normal(shape, np.float32), sizes.dtype)
  table = rng.standard_normal((sizes.vocab_size, sizes.width), np.float32)
  # Logits of standard deviation 2.
  table *= 2 * sizes.width**-0.5
  labels = losses.make_labels(sizes, rng)
  lengths = jnp.full(sizes.batch, sizes.labels)
  return states, jnp.asarray(table), jnp.asarray(labels), lengths


def _compile(
  sizes: HeadSizes, name: str, args: tuple[jax.Array, ...]
) -> jax.stages.Compiled:
  """Compiles the objective of a head, and its gradients."""

  def objective(
    states: jax.Array, table: jax.Array, labels: jax.Array, lengths: jax.Array
  ) -> jax.Array:
    if name == _OPTAX:
      return _plain_objective(project(states, table), labels)
    if name == _CHUNKED:
      logits = ChunkedLogits(states, table, sizes.chunk_size)
    else:
      logits = project(states, table)
    return query_ctc_objective(
      logits,
      labels,
      lengths,
      blank_id=sizes.vocab_size - 1,
      label_smoothing=_SMOOTHING,
    )[0]

  step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))
  return step.lower(*args).compile()


def _plain_objective(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the objective by `optax.ctc_loss`; all labels count."""
  nll = optax.ctc_loss(
    logits,
    jnp.zeros(logits.shape[:2]),
    labels,
    jnp.zeros(labels.shape),
    blank_id=logits.shape[2] - 1,
  )
  smooth = jax.nn.log_softmax(logits).mean()
  nll = nll.mean() / labels.shape[1]
  return (1 - _SMOOTHING) * nll - _SMOOTHING * smooth


def format_report(report: dict[str, Any]) -> str:
  """Returns the report as text."""
  megabytes = timing.format_megabytes
  return losses.format_report(
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
  losses.define_flags(HeadSizes(), rounds=5)


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  losses.run(HeadSizes, benchmark, format_report)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
