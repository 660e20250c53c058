"""A small source whose records contain their index, and tasks for it."""

from typing import Any

import numpy as np

from narvl_jax.data import tasks
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.vocabulary.vocabulary import Vocabulary

H, W, T, L = 6, 8, 24, 9
NUMBERS = "one two three four five six seven"


class NumberSource:
  """Pictures of one colour; every field of record i contains i."""

  def __init__(
    self, task: str, count: int, bad: dict[int, Any] | None = None
  ) -> None:
    self.task = task
    self.count = count
    self.bad = bad or {}
    self.reads: list[int] = []

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Record:
    assert 0 <= index < self.count
    self.reads.append(index)
    number = NUMBERS.split()[index % 7]
    prompt, answers = f"what is {number}", {number: 0.5}
    image: Any = np.full((H, W, 3), index % 256, np.uint8)
    fault = self.bad.get(index)
    if isinstance(fault, Exception):
      raise fault
    if fault == "image":
      image = b"no image"
    elif fault == "prompt":
      prompt = ""
    elif fault == "long prompt":
      prompt = "one " * 40
    elif fault == "long answer":
      answers = {"one " * 40: 1.0}
    elif fault == "no answer":
      answers = {}
    if self.task == "entailment":
      answers = {"yes": 1.0}
    box = (1.0, 2.0, 3.0, 4.0)
    return Record(f"{self.task}{index}", self.task, image, prompt, answers, box)


class ListSource(list[Any]):
  """Records in memory, some of which are exceptions."""

  def __getitem__(self, index: Any) -> Any:
    found = super().__getitem__(index)
    if isinstance(found, Exception):
      raise found
    return found

  def locate(self, index: int) -> str:
    return f"list.tsv row {index + 1}"


def make_tasks() -> dict[str, tasks.Task[Any]]:
  """Returns all tasks with a vocabulary of the source."""
  texts: list[str] = []
  for name in TASKS:
    source: Any = NumberSource(name, 7)
    texts += tasks.vocabulary_texts(name, {}, source)
  vocabulary = Vocabulary.train(texts * 2, 300, num_bins=16)
  return {name: tasks.make_task(name, vocabulary) for name in TASKS}
