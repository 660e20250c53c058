"""Times the Query-CTC loss with its gradient against other CTC losses.

  python -m narvl_jax.benchmarks.query_ctc [--json=PATH]

Compares, in one run and in turn: `query_ctc_loss`, plain `optax.ctc_loss`
over all classes, and, where torch is installed, its `ctc_loss` on the CPU.
Each computes the mean loss of a batch and its gradient with respect to the
logits. `ratio` is the time of a candidate over that of `query_ctc_loss` in the
same round; `temp` is XLA's temporary memory, `out` the results, of which the
gradient is nearly all. The differences are those from `query_ctc_loss`,
relative to its loss and to the norm of its gradient.

Measured on one shared core with AVX-512, 2026-11: 53 ms, 4.2 times as fast as
optax and 5.2 times as fast as torch; 36 ms of it are page faults of the fresh
gradient, which all of them pay.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from narvl_jax.benchmarks import timing
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_json
from narvl_jax.errors import UserError
from narvl_jax.query_ctc import query_ctc_loss

_OURS = "query_ctc_loss"


@dataclasses.dataclass(frozen=True)
class LossSizes:
  """One problem: every target has `labels` labels, none beside its equal."""

  batch: int = 16
  num_queries: int = 20
  labels: int = 16
  vocab_size: int = 59458
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


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """A loss ready to run; bytes are None where XLA does not count them."""

  run: Callable[[], Any]
  temp_bytes: int | None = None
  output_bytes: int | None = None


def benchmark(sizes: LossSizes, *, rounds: int) -> dict[str, Any]:
  """Measures all candidates.

  Args:
    sizes: the problem.
    rounds: how often each is timed.

  Returns:
    What `--json` writes: times in milliseconds, memory in bytes.
  """
  rng = np.random.default_rng(0)
  shape = (sizes.batch, sizes.num_queries, sizes.vocab_size)
  logits = jnp.asarray(2 * rng.standard_normal(shape, np.float32), sizes.dtype)
  # Neighbours differ: a repeat would need one more query.
  start = rng.integers(sizes.vocab_size - 1, size=(sizes.batch, 1))
  labels = (start + 7 * np.arange(sizes.labels)) % (sizes.vocab_size - 1)
  candidates = {
    _OURS: _jax_candidate(_ours, logits, labels),
    "optax.ctc_loss": _jax_candidate(_plain, logits, labels),
  }
  torch_installed = importlib.util.find_spec("torch") is not None
  if torch_installed:
    candidates["torch (CPU)"] = _torch_candidate(logits, labels)
  differences = _differences({k: c.run() for k, c in candidates.items()})
  timings = timing.measure(
    {name: c.run for name, c in candidates.items()}, rounds=rounds
  )
  results = {}
  for name, candidate in candidates.items():
    seconds = timings[name].seconds
    results[name] = {
      "milliseconds": timing.spread(1e3 * seconds),
      "ratio": timing.spread(seconds / timings[_OURS].seconds),
      "cpu_share": timings[name].cpu_share,
      "temp_bytes": candidate.temp_bytes,
      "output_bytes": candidate.output_bytes,
      **differences[name],
    }
  versions = {"optax": optax.__version__}
  if torch_installed:
    import torch

    versions["torch"] = torch.__version__
  return {
    "benchmark": "query_ctc",
    "sizes": dataclasses.asdict(sizes),
    "rounds": rounds,
    "logits_bytes": logits.nbytes,
    "environment": {**timing.environment(), **versions},
    "results": results,
  }


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
  """The same in torch, fp32, as its CTC knows no other type."""
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


def _differences(
  outputs: dict[str, tuple[Any, Any]],
) -> dict[str, dict[str, float]]:
  """Relative differences of loss and gradient from ours."""
  loss, gradient = (np.asarray(x, np.float32) for x in outputs[_OURS])
  return {
    name: {
      "loss_difference": float(abs(np.asarray(other) - loss) / abs(loss)),
      "gradient_difference": float(
        np.linalg.norm(np.asarray(other_gradient, np.float32) - gradient)
        / np.linalg.norm(gradient)
      ),
    }
    for name, (other, other_gradient) in outputs.items()
  }


def format_report(report: dict[str, Any]) -> str:
  """Returns the report as a table for people."""
  megabytes = timing.format_megabytes
  return timing.format_report(
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
  sizes = LossSizes()
  common_flags.batch_size(
    "Examples at a time.", sizes.batch, old="batch", lower_bound=1
  )
  flags.DEFINE_integer(
    "num_queries", sizes.num_queries, "Queries of an example.", lower_bound=1
  )
  flags.DEFINE_integer(
    "labels", sizes.labels, "Labels of an example.", lower_bound=1
  )
  flags.DEFINE_integer(
    "vocab_size", sizes.vocab_size, "Classes, with blank.", lower_bound=2
  )
  flags.DEFINE_enum(
    "dtype", sizes.dtype, ["float32", "bfloat16"], "Type of the logits."
  )
  flags.DEFINE_integer("rounds", 9, "Rounds of measurement.", lower_bound=1)
  common_flags.json()


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  sizes = LossSizes(
    settings.batch_size,
    settings.num_queries,
    settings.labels,
    settings.vocab_size,
    settings.dtype,
  )
  check_json_path(settings.json)
  report = benchmark(sizes, rounds=settings.rounds)
  print(format_report(report), flush=True)
  write_json(settings.json, report)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
