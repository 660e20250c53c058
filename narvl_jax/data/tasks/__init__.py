"""Tasks: from a record to the model's input, from its output to an answer."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from narvl_jax.data.answer_text import checked_text
from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.tasks.base import AnswerSpace as AnswerSpace
from narvl_jax.data.tasks.base import Encoded as Encoded
from narvl_jax.data.tasks.base import Task as Task
from narvl_jax.data.tasks.base import check_num_queries as check_num_queries
from narvl_jax.data.tasks.caption import CaptionTask
from narvl_jax.data.tasks.entailment import EntailmentTask
from narvl_jax.data.tasks.grounding import GroundingTask
from narvl_jax.data.tasks.settings import parse_settings
from narvl_jax.data.tasks.vqa import VqaTask
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError, did_you_mean

_CLASSES: dict[str, type[Task[Any]]] = {
  task.name: task
  for task in (CaptionTask, VqaTask, GroundingTask, EntailmentTask)
}


def make_task(
  name: str,
  vocabulary: Vocabulary | None,
  settings: Mapping[str, Any] | None = None,
) -> Task[Any]:
  """Returns a task.

  Args:
    vocabulary: vocabulary of the run; without one only `texts` may be called.
    settings: settings that differ from `default_settings(name)`.

  Raises:
    UserError: the name, a setting's name or a value is wrong.
  """
  task_class = _task_class(name)
  parsed = parse_settings(name, task_class.settings_class, settings or {})
  return task_class(vocabulary, parsed)


def default_settings(name: str) -> dict[str, Any]:
  """Returns the settings of a task and their defaults."""
  return dataclasses.asdict(_task_class(name).settings_class())


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
  """Checks the settings of a task without a vocabulary or files.

  Raises:
    UserError: the name, a setting's name or a value is wrong.
  """
  parse_settings(name, _task_class(name).settings_class, settings)


def vocabulary_texts(
  name: str,
  settings: Mapping[str, Any] | None,
  records: Sequence[Record],
  on_bad: Callable[[BadRecord], object] = lambda record: None,
) -> Iterator[str]:
  """Yields every text of the good `records` that the task encodes.

  Args:
    on_bad: called with each bad record.
  """
  task = make_task(name, None, settings)
  reader = RecordReader(records, name)
  for i in range(len(records)):
    texts = reader.read(
      i, lambda record: [checked_text(text) for text in task.texts(record)]
    )
    if isinstance(texts, BadRecord):
      on_bad(texts)
    else:
      yield from texts


def _task_class(name: str) -> type[Task[Any]]:
  if name not in _CLASSES:
    raise UserError(
      f'there is no task "{name}".{did_you_mean(name, TASKS)} Change --task'
      " or the task in --config.data"
    )
  return _CLASSES[name]
