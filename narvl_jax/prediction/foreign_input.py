"""Warnings about requests unlike the training data."""

import dataclasses
from typing import Any

from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images
from narvl_jax.data.tasks import Task
from narvl_jax.errors import list_few
from narvl_jax.experiment.experiment import Experiment

# Ratios of picture and model input per side. Photographs are stretched by up to
# 16 / 9 in training, too.
_SCALE = 4.0
_STRETCH = 2.0
_SHOWN = 5


def warnings_about(
  experiment: Experiment, record: Record, *, resized: bool = True
) -> list[str]:
  """Returns a sentence about each property the model was not trained for.

  Args:
    experiment: the run.
    record: the request.
    resized: whether to check the size of the picture, unless it is from the
      run's own data.
  """
  found = _unknown_words(experiment, record)
  if resized:
    found += _resizing(experiment, record)
  return found


def _unknown_words(experiment: Experiment, record: Record) -> list[str]:
  task: Task[Any] = experiment.tasks[record.task]
  settings = experiment.config.vocabulary
  vocabulary = experiment.vocabulary
  # A vocabulary that is not full has every word of its texts as one token.
  whole = settings.source == "train" and vocabulary.size < settings.size
  # Words of the truth do not count.
  asked = dataclasses.replace(record, answers={}, box=None)
  unknown = dict.fromkeys(
    word
    for text in task.source_texts(asked)
    for word in vocabulary.unknown_words(text, whole=whole)
  )
  if not unknown:
    return []
  words = [f'"{word}"' for word in unknown]
  shown = list_few(words, _SHOWN)
  why = (
    "not in the texts from which the vocabulary of this run was trained"
    if whole
    else "spelled out letter by letter or without any token"
  )
  return [f"unknown words: {shown} ({why}); the answer may be meaningless"]


def _resizing(experiment: Experiment, record: Record) -> list[str]:
  width, height = images.original_size(record.image)
  rows, columns = experiment.config.data.image_size
  down, right = height / rows, width / columns
  stretch = max(down, right) / min(down, right)
  size = f"the picture of {width}x{height} pixels (width x height)"
  found = []
  if max(down, right) > _SCALE:
    found.append(
      f"{size} is reduced to {columns}x{rows} for this model; details smaller"
      f" than {max(down, right):.0f} pixels are lost"
    )
  elif max(down, right) < 1 / _SCALE:
    found.append(
      f"{size} is enlarged to {columns}x{rows} for this model, so it shows"
      " fewer details than those of the training"
    )
  if stretch > _STRETCH:
    found.append(
      f"{size} is squeezed to {columns}x{rows} for this model: its longer side"
      f" shrinks {stretch:.1f} times as much as the other; crop it first"
    )
  return found
