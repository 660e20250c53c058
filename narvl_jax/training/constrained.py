"""Closed answer sets that constrain an autoregressive model in training."""

from narvl_jax.data.example import TASKS
from narvl_jax.decoding.constraint import Automaton, answer_trie
from narvl_jax.errors import UserError
from narvl_jax.experiment.experiment import Experiment

CONSTRAINED_OFF = "--config.loss.constrained=False"


def answer_constraints(experiment: Experiment) -> dict[int, Automaton]:
  """Returns the allowed answers by task index, without eos.

  Only tasks with an answer list count (VQA, entailment), as in the reference,
  which masks no coordinates in training. Empty if `config.loss.constrained` is
  off, and without tasks (when only shapes are needed).

  Raises:
    UserError: an answer list is missing or unreadable, or no task has one.
  """
  if not experiment.config.loss.constrained or not experiment.tasks:
    return {}
  lists = {name: allowed_answers(experiment, name) for name in experiment.tasks}
  constraints = {
    TASKS.index(name): answer_trie(answers)
    for name, answers in lists.items()
    if answers
  }
  if not constraints:
    raise UserError(
      "loss.constrained=True needs a task whose answers are a list, vqa or"
      f" entailment; this run has {', '.join(lists)}: {CONSTRAINED_OFF}"
    )
  return constraints


def allowed_answers(experiment: Experiment, name: str) -> list[tuple[int, ...]]:
  """Returns the answer list of a task, without eos; empty if it has none."""
  return list(map(tuple, experiment.tasks[name].candidates() or []))
