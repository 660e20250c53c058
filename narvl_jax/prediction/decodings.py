"""Decodings of the tasks of a run, from the settings of a user."""

import hashlib
from collections.abc import Mapping
from typing import Any

from narvl_jax.data.answers import load_answers
from narvl_jax.decoding import Decoding
from narvl_jax.decoding.settings import METHODS
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.prediction.decoding_flags import REFERENCE, SETTINGS
from narvl_jax.prediction.readers import reference_decoding

# Parallel models ignore these.
_AUTOREGRESSIVE = ("min_length", "max_length", "no_repeat_ngram", "normalize")
# Setting -> the methods that use it.
_HEEDED_BY = {
  "beam_size": ("beam",),
  "num_best": ("beam", "candidates"),
  "normalize": ("beam",),
}


def decoding_name(settings: Mapping[str, Any] | None, answers: str = "") -> str:
  """Returns a name of the settings; it differs if an answer may differ.

  Args:
    settings: see `decodings_for`.
    answers: file of the answers that VQA allows; the config's if "".

  Returns:
    The method and the settings that are not defaults, such as `greedy` or
    `beam-constrained-num_best3`; a digest of the list of answers.

  Raises:
    UserError: the file cannot be read.
  """
  given = dict(settings or {})
  method = given.pop("method", METHODS[0])
  parts = [method]
  for name in SETTINGS:
    value = given.get(name)
    # The defaults of the reference depend on the task.
    default = getattr(Decoding(), name) if method != REFERENCE else None
    if value in (None, default):
      continue
    if isinstance(value, bool):
      parts.append(name if value else f"no_{name}")
    else:
      parts.append(f"{name}{value}")
  if answers:
    content = repr(load_answers(answers)).encode()
    parts.append(f"answers_{hashlib.sha256(content).hexdigest()[:8]}")
  return "-".join(parts)


def decodings_for(
  experiment: Experiment, settings: Mapping[str, Any] | None
) -> dict[str, Decoding]:
  """Returns the decoding of every task of an experiment.

  Args:
    experiment: the run.
    settings: "method" (one of `METHODS` or "reference") and fields of
      `Decoding`; greedy if None. "constrained" applies to the tasks with a set
      of answers, all but captions.

  Raises:
    UserError: a method, setting or value is unknown or out of range, or no
      task uses a setting.
  """
  if settings is not None and not isinstance(settings, Mapping):
    raise UserError(
      f"decoding={settings!r} is not a dict; such as"
      f' decoding={{"method": "beam",'
      ' "beam_size": 5}'
    )
  given = dict(settings or {})
  method = given.pop("method", METHODS[0])
  for name in given:
    if name not in SETTINGS:
      known = ("method", *SETTINGS)
      raise UserError(f'decoding has no "{name}".{did_you_mean(name, known)}')
  decodings = {
    name: _decoding(experiment, name, method, given)
    for name in experiment.tasks
  }
  _check_effect(experiment, method, given, decodings)
  return decodings


def _check_effect(
  experiment: Experiment,
  method: str,
  given: Mapping[str, Any],
  decodings: Mapping[str, Decoding],
) -> None:
  """Raises UserError for settings without effect."""
  used = {decoding.method for decoding in decodings.values()}
  for name, value in given.items():
    if name in _AUTOREGRESSIVE and not experiment.autoregressive:
      raise UserError(
        f"--{name}={value} is for autoregressive models, but this run answers"
        f" in parallel; leave --{name} out"
      )
    used_by = _HEEDED_BY.get(name)
    if used_by and used and used.isdisjoint(used_by):
      raise UserError(
        f"--{name}={value} changes nothing with --decoding={method}; add"
        f" --decoding={used_by[0]}, or leave --{name} out"
      )


def check_answers_used(decodings: Mapping[str, Decoding], answers: str) -> None:
  """Checks that a list of answers has an effect.

  Args:
    decodings: decodings of the tasks to predict; not checked if empty.
    answers: file of the list; none if "".

  Raises:
    UserError: VQA is not predicted, or not constrained.
  """
  if not answers or not decodings:
    return
  if "vqa" not in decodings:
    raise UserError(
      f'--answers="{answers}" is for vqa; the task is'
      f" {', '.join(decodings)}: leave --answers out"
    )
  decoding = decodings["vqa"]
  if not decoding.constrained and decoding.method != "candidates":
    raise UserError(
      f'--answers="{answers}" changes nothing with --decoding='
      f"{decoding.method} alone; add --constrained, or use"
      " --decoding=candidates"
    )


def _decoding(
  experiment: Experiment,
  task_name: str,
  method: str,
  settings: Mapping[str, Any],
) -> Decoding:
  if method == REFERENCE:
    base = vars(reference_decoding(experiment, task_name))
  elif method in METHODS:
    base = {"method": method}
  else:
    names = (*METHODS, REFERENCE)
    raise UserError(
      f'--decoding="{method}" is unknown.{did_you_mean(method, names)}'
    )
  merged = {**base, **settings}
  if experiment.tasks[task_name].open_ended and merged["method"] != METHODS[-1]:
    merged["constrained"] = False
  return Decoding(**merged)
