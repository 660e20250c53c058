"""Decoding flags of all commands that predict."""

from typing import Any

from absl import flags

from narvl_jax.command_line import flags as common_flags

# Shown by --help of the command as its own flags.
flags.disclaim_key_flags()

REFERENCE = "reference"
SETTINGS = (
  "constrained",
  "beam_size",
  "num_best",
  "min_length",
  "max_length",
  "no_repeat_ngram",
  "normalize",
)


def define_flags(default: str = "greedy") -> None:
  """Defines --decoding and its settings."""
  common_flags.choice(
    "decoding",
    default,
    ("greedy", "beam", "candidates", REFERENCE),
    f"{REFERENCE}: an autoregressive model as the official code decodes each"
    " task, a parallel one greedily.",
  )
  flags.DEFINE_bool(
    "constrained",
    None,
    "Only answers that the task allows; captions are free text.",
  )
  for name, text in (
    ("beam_size", "Hypotheses of a beam search."),
    ("num_best", "Answers of each request."),
    ("min_length", "Autoregressive: tokens of an answer at least."),
    ("max_length", "Autoregressive: tokens of an answer at most."),
    ("no_repeat_ngram", "Autoregressive: no n-gram twice."),
  ):
    flags.DEFINE_integer(name, None, text)
  flags.DEFINE_bool(
    "normalize", None, "Autoregressive: rank by mean log-probability."
  )


def from_flags() -> dict[str, Any]:
  """Returns the settings of the flags, for `decodings.decodings_for`."""
  values = flags.FLAGS
  given = {name: getattr(values, name) for name in SETTINGS}
  return {
    "method": values.decoding,
    **{name: value for name, value in given.items() if value is not None},
  }
