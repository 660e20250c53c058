"""The closed answer sets that an autoregressive model is trained within."""

from narvl_jax.data.example import TASKS
from narvl_jax.decoding.constraint import Automaton, answer_trie
from narvl_jax.errors import UserError
from narvl_jax.experiment.experiment import Experiment

# How to train without them.
CONSTRAINED_OFF = "--config.loss.constrained=False"


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
  """Returns the answers of a task without eos; none if they are no list."""
  return list(map(tuple, experiment.tasks[name].candidates() or []))
