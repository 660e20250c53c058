r"""Compares the parallel model with its autoregressive counterpart.

    python -m narvl_jax.compare --nar=runs/nar --ar=runs/ar
    python -m narvl_jax.compare --nar=runs/nar --ar=runs/ar \
      --tasks=caption,vqa --batch_size=1,8 --rounds=20 --to=comparison
    python -m narvl_jax.compare --size=base --uncached --batch_size=1
    python -m narvl_jax.compare --size=base --topology=v5e:2x2

Prints tables of quality and latency for every way to decode, and writes
comparison.json and latency.png into --to. With --size only latency is measured,
using random weights at the resolutions of the official models; --topology
compiles these programs for a TPU and prints the compiler's estimates.
docs/performance.md describes the measurements.
"""

from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.comparison.options import LENGTHS, Options
from narvl_jax.errors import UserError


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("nar", "", "Run folder of a parallel model.")
  flags.DEFINE_string("ar", "", "Run folder of an autoregressive model.")
  flags.DEFINE_string(
    "size", "", "Random weights of this size instead, for latency alone."
  )
  flags.DEFINE_string(
    "topology",
    "",
    "CHIP:SHAPE, such as v5e:2x2, for --size: the compiler's estimate for one"
    " chip, without a TPU.",
  )
  flags.DEFINE_list("tasks", [], "Tasks to compare; default: all.")
  common_flags.split("Split of the data sets.", "test")
  common_flags.max_examples(
    "At most this many examples of every data set; 0: all.", 0
  )
  common_flags.checkpoint()
  flags.DEFINE_integer("image_size", None, "Pixels a side, for --size.")
  flags.DEFINE_list("batch_size", ["1", "8"], "Batch sizes, one or several.")
  common_flags.rename("batch_sizes", "batch_size")
  flags.DEFINE_integer("rounds", 10, "How often each program is timed.")
  flags.DEFINE_list(
    "lengths",
    None,
    f"Tokens of an answer, for the plot; empty: no plot. Default:"
    f" {','.join(map(str, LENGTHS))}, as far as the models have positions.",
  )
  flags.DEFINE_integer("beam_size", 5, "Hypotheses of the beam searches.")
  flags.DEFINE_list("ways", [], "Decodings, such as ar-beam; default: all.")
  common_flags.answers("the runs'")
  flags.DEFINE_bool("uncached", False, "Time greedy search without a cache.")
  flags.DEFINE_bool("no_quality", False, "Do not score the answers.")
  flags.DEFINE_bool("no_latency", False, "Do not time anything.")
  common_flags.to("Folder for the results.")
  common_flags.compilation_cache()


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  # Imported here, so that --help is fast.
  from narvl_jax.comparison.comparison import compare

  compare(_options(flags.FLAGS))


def _options(values: flags.FlagValues) -> Options:
  return Options(
    nar=values.nar,
    ar=values.ar,
    size=values.size,
    topology=values.topology,
    tasks=values.tasks,
    split=values.split,
    max_examples=values.max_examples,
    checkpoint=values.checkpoint,
    image_size=values.image_size,
    batch_sizes=_numbers("batch_size", values.batch_size),
    rounds=values.rounds,
    lengths=None
    if values.lengths is None
    else _numbers("lengths", values.lengths),
    beam_size=values.beam_size,
    ways=values.ways,
    answers=values.answers,
    uncached=values.uncached,
    measure_quality=not values.no_quality,
    measure_latency=not values.no_latency,
    to=values.to,
  )


def _numbers(flag: str, values: Sequence[str]) -> list[int]:
  for value in values:
    if not value.strip().isdecimal():
      raise UserError(
        f'--{flag}: "{value}" is not a whole number; such as --{flag}=1,8'
      )
  return [int(value) for value in values]


if __name__ == "__main__":
  define_flags()
  cli.run(main)
