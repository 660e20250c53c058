"""The closed answer sets that an autoregressive model is trained within."""

from collections.abc import Sequence

from narvl_jax.data.example import TASKS
from narvl_jax.decoding.constraint import Automaton, answer_trie
from narvl_jax.errors import UserError
from narvl_jax.experiment import Experiment
from narvl_jax.run_data import MixtureEntry, encode_first

_OFF = "--config.loss.constrained=False"


def answer_constraints(experiment: Experiment) -> dict[int, Automaton]:
  """Returns what each task allows: {task index: automaton}, without eos.

  Only lists count, those of VQA and entailment: the reference masks no
  coordinates in training. Empty if `config.loss.constrained` is off, and
  without tasks, when only shapes are asked for.

  Raises:
    UserError: the list of a task is missing or cannot be read, or no task has
      one.
  """
  if not experiment.config.loss.constrained or not experiment.tasks:
    return {}
  lists = {name: _allowed(experiment, name) for name in experiment.tasks}
  constraints = {
    TASKS.index(name): answer_trie(answers)
    for name, answers in lists.items()
    if answers
  }
  if not constraints:
    raise UserError(
      "loss.constrained=True needs a task whose answers are a list, vqa or"
      f" entailment; this run has {', '.join(lists)}: {_OFF}"
    )
  return constraints


def check_answers(
  experiment: Experiment, mixture: Sequence[MixtureEntry]
) -> None:
  """Checks that the first targets of each source are allowed.

  Raises:
    UserError: one is not, so that it could not be learned.
  """
  if not experiment.config.loss.constrained:
    return
  eos = experiment.vocabulary.eos_id
  for source, name, _, entry in mixture:
    allowed = set(_allowed(experiment, name))
    if not allowed:
      continue
    for encoded in encode_first(source, experiment.tasks[name], entry):
      answer = tuple(token for token in encoded.label_ids if token != eos)
      if answer not in allowed:
        text = experiment.vocabulary.decode(answer).strip()
        raise UserError(
          f'the target "{text}" of data.train.{entry} is not among the'
          f" {len(allowed):,} answers of {name}, within which"
          " loss.constrained=True trains; add it to the list"
          f" (--config.tasks.{name}.answers), or {_OFF}"
        )


def _allowed(experiment: Experiment, name: str) -> list[tuple[int, ...]]:
  """Returns the answers of a task without eos; none if they are no list."""
  return list(map(tuple, experiment.tasks[name].candidates() or []))
