"""Readers for the tasks and decodings of an experiment."""

import dataclasses

import numpy as np

from narvl_jax.data.example import TASKS
from narvl_jax.decoding import (
  AutoregressiveReader,
  Classes,
  Decoding,
  ParallelReader,
)
from narvl_jax.decoding.answers import AnswerSet
from narvl_jax.decoding.parallel_reader import check_queries
from narvl_jax.decoding.steps import Reader
from narvl_jax.errors import UserError
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.parallel import BATCH_AXES, VOCAB_AXIS
from narvl_jax.query_ctc import MeshAxes

# How the official code decodes its autoregressive model (reference
# specification 11.4); the parallel one is read greedily.
_REFERENCE = {
  "caption": Decoding(
    "beam", beam_size=5, min_length=1, max_length=16, no_repeat_ngram=3
  ),
  "grounding": Decoding(
    "beam", beam_size=5, min_length=4, max_length=4, no_repeat_ngram=3
  ),
  "vqa": Decoding("candidates", constrained=True),
  "entailment": Decoding("candidates", constrained=True),
}


def reference_decoding(experiment: Experiment, task_name: str) -> Decoding:
  """Returns the official decoding of a task for the model of a run."""
  if not experiment.autoregressive:
    return Decoding()
  return _REFERENCE[task_name]


def make_reader(
  experiment: Experiment, task_name: str, decoding: Decoding
) -> Reader:
  """Returns the reader; equal ones share compiled programs.

  Raises:
    UserError: the decoding does not fit the task or the model.
  """
  vocabulary, config = experiment.vocabulary, experiment.config
  masked = config.evaluation.mask_specials
  bins = vocabulary.bin_start, vocabulary.num_bins
  classes = Classes.of(
    experiment.model_config.vocab_size,
    pad_id=vocabulary.pad_id,
    eos_id=vocabulary.eos_id,
    blank_id=None if experiment.autoregressive else vocabulary.blank_id,
    forbidden=vocabulary.forbidden if masked else None,
    bins=bins if "grounding" in experiment.tasks else None,
  )
  answers = _answers(experiment, task_name, decoding)
  _check_beam(decoding, classes)
  if experiment.autoregressive:
    return AutoregressiveReader(
      classes,
      # Lengths are inputs of the program.
      dataclasses.replace(decoding, min_length=0, max_length=0),
      length_limit=_room(experiment, answers),
      prompted=experiment.prompted[TASKS.index(task_name)],
      answers=answers,
    )
  if answers is not None:
    check_queries(
      answers,
      experiment.model_config.num_queries,
      merge_repeats=experiment.tasks[task_name].merge_repeats,
    )
  return ParallelReader(
    classes, decoding, answers, MeshAxes(BATCH_AXES, VOCAB_AXIS)
  )


def answer_lengths(experiment: Experiment, decoding: Decoding) -> np.ndarray:
  """Returns least and most tokens of an answer, int32 [2]."""
  limit = experiment.label_length - 1
  most = min(decoding.max_length or limit, limit)
  return np.asarray([min(decoding.min_length, most), most], np.int32)


def _room(experiment: Experiment, answers: AnswerSet | None) -> int:
  """Returns the most tokens of an answer, without eos.

  Raises:
    UserError: every allowed answer is longer.
  """
  room = experiment.label_length - 1
  shortest = 0 if answers is None else answers.shortest
  if shortest > room:
    raise UserError(
      f"the shortest answer that {answers.name if answers else ''} allows has"
      f" {shortest} tokens, but the model was trained for {room} and eos"
      f" (--config.data.max_label_length={shortest + 1})"
    )
  return room


def _answers(
  experiment: Experiment, task_name: str, decoding: Decoding
) -> AnswerSet | None:
  """Returns the allowed answers; None for unconstrained decoding.

  Raises:
    UserError: the decoding is constrained, but the task allows any text.
  """
  if not decoding.constrained and decoding.method != "candidates":
    return None
  task = experiment.tasks[task_name]
  space = task.answer_space()
  if space is None:
    raise UserError(
      f"{task_name} has no set of answers, so it cannot be decoded with"
      f" --decoding={decoding.method}"
      f"{' --constrained' if decoding.constrained else ''}; leave the task out"
      " or use --decoding=beam"
    )
  # Targets of the parallel decoder may end with eos as a label.
  ends = task.settings.eos and not experiment.autoregressive
  return AnswerSet(
    task_name,
    sequences=tuple(map(tuple, space.sequences)),
    tokens=tuple(space.tokens),
    count=space.count,
    then=(experiment.vocabulary.eos_id,) if ends else (),
  )


def _check_beam(decoding: Decoding, classes: Classes) -> None:
  """Raises UserError for a beam larger than the vocabulary."""
  most = classes.vocab_size - 1
  if decoding.method == "beam" and decoding.beam_size > most:
    raise UserError(
      f"--beam_size={decoding.beam_size} exceeds the {most} tokens of the"
      f" vocabulary; nearest: --beam_size={most}"
    )
