"""One record of each task, and a vocabulary of their words."""

import dataclasses
from typing import Any

import numpy as np

from narvl_jax.data import tasks
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.vocabulary.vocabulary import Vocabulary

SIZE = (200, 100)
PICTURE = np.zeros((100, 200, 3), np.uint8)
RECORDS = {
  "caption": Record(
    "c1", "caption", PICTURE, answers={"A red, RED dog!": 1.0, "cat": 1.0}
  ),
  "vqa": Record(
    "v1",
    "vqa",
    PICTURE,
    prompt="What COLOR is it",
    answers={"blue": 0.3, "red": 1.0, "green": 1.0},
    objects=("dog", "cat"),
  ),
  "grounding": Record(
    "g1", "grounding", PICTURE, prompt="The dog", box=(0, 25, 100, 100)
  ),
  "entailment": Record(
    "e1",
    "entailment",
    PICTURE,
    prompt="A dog",
    premise="A cat",
    answers={"maybe": 1.0},
  ),
}


def make_vocabulary() -> Vocabulary:
  """Returns a small vocabulary with 11 bins."""
  texts = [
    text
    for name in TASKS
    for text in tasks.vocabulary_texts(name, {}, [RECORDS[name]] * 5)
  ]
  return Vocabulary.train([*texts, " dog cat ?"] * 2, 300, num_bins=11)


def changed(name: str, **changes: Any) -> Record:
  """Returns the record of a task with other fields."""
  return dataclasses.replace(RECORDS[name], **changes)
