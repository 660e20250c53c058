"""Gives a trained run the list of answers that constrained VQA allows."""

import dataclasses
import os

from narvl_jax.errors import UserError
from narvl_jax.experiment.experiment import Experiment


def with_answers(
  experiment: Experiment, path: str | os.PathLike[str]
) -> Experiment:
  """Returns an experiment whose VQA allows the answers of a file.

  What is read without a constraint stays the same.

  Args:
    experiment: is not changed.
    path: see `narvl_jax.data.answers.load_answers`; it is read when the first
      constrained answer is.

  Raises:
    UserError: the run does not answer questions.
  """
  task = experiment.tasks.get("vqa")
  if task is None:
    raise UserError(
      f'--answers="{path}" is for vqa, on which the run was not trained (its'
      f" tasks: {', '.join(experiment.tasks)}); leave it out"
    )
  settings = dataclasses.replace(task.settings, answers=os.fspath(path))
  config = experiment.config.copy_and_resolve_references()
  config.tasks.vqa.answers = settings.answers
  tasks = {**experiment.tasks, "vqa": type(task)(task.vocabulary, settings)}
  return dataclasses.replace(experiment, config=config, tasks=tasks)
