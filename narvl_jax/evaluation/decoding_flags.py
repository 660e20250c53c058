"""Flags that say how answers are read, for every command that reads some."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from narvl_jax.decoding import Decoding
from narvl_jax.decoding.settings import METHODS
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.evaluation.readers import reference_decoding

if TYPE_CHECKING:
  from narvl_jax.experiment import Experiment

_REFERENCE = "reference"
_SETTINGS = (
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
  flags.DEFINE_string(
    "decoding",
    default,
    f"{', '.join(METHODS)}, or {_REFERENCE}: as the official code decodes each"
    " task of an autoregressive model; parallel ones are read greedily.",
  )
  flags.DEFINE_bool(
    "constrained",
    None,
    "Only answers that the task allows; captions may be anything.",
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
  """Returns what the flags ask for, for `decodings_for`."""
  values = flags.FLAGS
  given = {name: getattr(values, name) for name in _SETTINGS}
  return {
    "method": values.decoding,
    **{name: value for name, value in given.items() if value is not None},
  }


def decodings_for(
  experiment: "Experiment", settings: Mapping[str, Any] | None
) -> dict[str, Decoding]:
  """Returns the decoding of every task of an experiment.

  Args:
    experiment: the run.
    settings: "method", one of `METHODS` or "reference", and fields of
      `Decoding` that replace its defaults; None: greedy. What is constrained
      are the tasks that have a set of answers: all but captions.

  Raises:
    UserError: an unknown method or a value out of range.
  """
  given = dict(settings or {})
  method = given.pop("method", METHODS[0])
  return {
    name: _decoding(experiment, name, method, given)
    for name in experiment.tasks
  }


def _decoding(
  experiment: "Experiment",
  task_name: str,
  method: str,
  settings: Mapping[str, Any],
) -> Decoding:
  if method == _REFERENCE:
    base = vars(reference_decoding(experiment, task_name))
  elif method in METHODS:
    base = {"method": method}
  else:
    names = (*METHODS, _REFERENCE)
    raise UserError(
      f'--decoding="{method}" is unknown.{did_you_mean(method, names)}'
    )
  merged = {**base, **settings}
  if experiment.tasks[task_name].open_ended and merged["method"] != METHODS[-1]:
    merged["constrained"] = False
  return Decoding(**merged)
