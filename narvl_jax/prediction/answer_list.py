"""Replaces the list of answers that constrained VQA allows."""

import dataclasses
import os

from narvl_jax.errors import UserError
from narvl_jax.experiment.experiment import Experiment


def with_answers(
  experiment: Experiment, path: str | os.PathLike[str]
) -> Experiment:
  """Returns a copy of an experiment whose VQA allows the answers of a file.

  Args:
    experiment: the experiment; not changed.
    path: see `narvl_jax.data.answers.load_answers`; read at the first
      constrained decoding.

  Raises:
    UserError: the run was not trained on VQA.
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
