"""Times the Query-CTC loss with its gradient against other CTC losses.

  python -m narvl_jax.benchmarks.query_ctc [--json=PATH]

The candidates are `query_ctc_loss`, plain `optax.ctc_loss` over all classes,
and PyTorch's `ctc_loss` on the CPU if torch is installed. Each computes the
mean loss of a batch and its gradient with respect to the logits. `ratio` is
the time over that of `query_ctc_loss` in the same round; `temp` XLA's
temporary memory; `out` the results, mainly the gradient. The differences are
relative to `query_ctc_loss`. Results are in docs/performance.md.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from narvl_jax.benchmarks import losses, timing
from narvl_jax.command_line import cli
from narvl_jax.query_ctc import query_ctc_loss


@dataclasses.dataclass(frozen=True)
class LossSizes:
  """One problem; the labels of a target are all different."""

  batch: int = 16
  num_queries: int = 20
  labels: int = 16
  vocab_size: int = 59458
  dtype: str = "float32"

  def __post_init__(self) -> None:
    """Raises UserError for a problem without solution."""
    losses.check_labels(self)


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """A loss ready to run; bytes are None where XLA does not report them."""

  run: Callable[[], Any]
  temp_bytes: int | None = None
  output_bytes: int | None = None


def benchmark(sizes: LossSizes, *, rounds: int) -> dict[str, Any]:
  """Measures all candidates.

  Args:
    sizes: the problem.
    rounds: number of measurements of each.

  Returns:
    The content of `--json`: times in milliseconds, memory in bytes.
  """
  rng = np.random.default_rng(0)
  shape = (sizes.batch, sizes.num_queries, sizes.vocab_size)
  logits = jnp.asarray(2 * rng.standard_normal(shape, np.float32), sizes.dtype)
  labels = losses.make_labels(sizes, rng)
  candidates = {
    "query_ctc_loss": _jax_candidate(_ours, logits, labels),
    "optax.ctc_loss": _jax_candidate(_plain, logits, labels),
  }
  versions = {"optax": optax.__version__}
  if importlib.util.find_spec("torch") is not None:
    import torch

    versions["torch"] = torch.__version__
    candidates["torch (CPU)"] = _torch_candidate(logits, labels)
  outputs = {name: candidate.run() for name, candidate in candidates.items()}
  timings = timing.measure(
    {name: c.run for name, c in candidates.items()}, rounds=rounds
  )
  return losses.make_report(
    "query_ctc",
    sizes,
    rounds=rounds,
    outputs={
      name: (np.float32(loss), [np.float32(gradient)])
      for name, (loss, gradient) in outputs.items()
    },
    timings=timings,
    facts={
      name: {
        "cpu_share": timings[name].cpu_share,
        "temp_bytes": candidate.temp_bytes,
        "output_bytes": candidate.output_bytes,
      }
      for name, candidate in candidates.items()
    },
    versions=versions,
  )


def _ours(logits: jax.Array, labels: jax.Array) -> jax.Array:
  b, _, v = logits.shape
  lengths = jnp.full(b, labels.shape[1])
  return query_ctc_loss(logits, labels, lengths, blank_id=v - 1)


def _plain(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.ctc_loss(
    logits,
    jnp.zeros(logits.shape[:2]),
    labels,
    jnp.zeros(labels.shape),
    blank_id=logits.shape[2] - 1,
  )


def _jax_candidate(
  loss: Callable[[jax.Array, jax.Array], jax.Array],
  logits: jax.Array,
  labels: np.ndarray,
) -> _Candidate:
  """Compiles the mean loss and its gradient."""
  step = jax.jit(jax.value_and_grad(lambda z, y: jnp.mean(loss(z, y))))
  targets = jnp.asarray(labels)
  compiled = step.lower(logits, targets).compile()
  memory = compiled.memory_analysis()
  return _Candidate(
    lambda: compiled(logits, targets),
    memory.temp_size_in_bytes if memory else None,
    memory.output_size_in_bytes if memory else None,
  )


def _torch_candidate(logits: jax.Array, labels: np.ndarray) -> _Candidate:
  """The same in torch, in float32, the only type of its CTC loss."""
  import torch

  b, n, v = logits.shape
  z = torch.tensor(np.asarray(logits, np.float32), requires_grad=True)
  targets = torch.tensor(labels)
  lengths = [torch.full((b,), x) for x in (n, labels.shape[1])]

  def run() -> tuple[Any, Any]:
    loss = torch.nn.functional.ctc_loss(
      torch.log_softmax(z, -1).transpose(0, 1),
      targets,
      *lengths,
      blank=v - 1,
      reduction="none",
    ).mean()
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach().numpy(), gradient.numpy()

  return _Candidate(run)


def format_report(report: dict[str, Any]) -> str:
  """Returns the report as text."""
  megabytes = timing.format_megabytes
  return losses.format_report(
    "loss and gradient",
    report,
    {
      "cpu/wall": lambda result: f"{result['cpu_share']:.2f}",
      "temp MB": lambda result: megabytes(result["temp_bytes"]),
      "out MB": lambda result: megabytes(result["output_bytes"]),
    },
  )


def define_flags() -> None:
  """Defines the flags of the command."""
  losses.define_flags(LossSizes(), rounds=9)


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  losses.run(LossSizes, benchmark, format_report)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
