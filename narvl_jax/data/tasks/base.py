"""The base class of tasks, and cleaning of text."""

import abc
import dataclasses
import itertools
import re
import string
from collections.abc import Mapping, Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from narvl_jax.data.answer_text import normalized_answers
from narvl_jax.data.example import Box, Record
from narvl_jax.data.pictures.images import Change
from narvl_jax.data.tasks.settings import Settings as Settings
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError

_LEADING = ",.!?*#:;~"
_SPACES = re.compile(r"\s{2,}")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Encoded(NamedTuple):
  """Ids of one example, not padded.

  Attributes:
    text_ids: source: bos, text, eos.
    label_ids: target, with eos last if `Settings.eos`; [] without a target.
    confidence: weight of the target in (0, 1].
  """

  text_ids: list[int]
  label_ids: list[int]
  confidence: float = 1.0


@dataclasses.dataclass(frozen=True)
class AnswerSpace:
  """All answers that a task allows, as ids without eos.

  Attributes:
    sequences: the answers, each at least one id long; or (), if each answer is
      any `count` of `tokens`.
    tokens: allowed ids.
    count: length of an answer.
  """

  sequences: tuple[tuple[int, ...], ...] = ()
  tokens: tuple[int, ...] = ()
  count: int = 0


S = TypeVar("S", bound=Settings)


class Task(abc.ABC, Generic[S]):
  """Turns records into ids and ids into answers.

  Attributes:
    open_ended: any text is an answer; `answer_space` returns None.
  """

  name: ClassVar[str]
  open_ended: ClassVar[bool] = True
  settings_class: ClassVar[type[Settings]]

  def __init__(self, vocabulary: Vocabulary | None, settings: S) -> None:
    """Without a vocabulary only `texts` may be called."""
    self._vocabulary = vocabulary
    self.settings = settings
    self.merge_repeats = settings.merge_repeats

  @property
  def vocabulary(self) -> Vocabulary:
    """Vocabulary of the run."""
    assert self._vocabulary is not None
    return self._vocabulary

  def encode(self, record: Record, *, with_target: bool = True) -> Encoded:
    """Returns the ids of a record.

    Args:
      with_target: False ignores the truth and returns no `label_ids`.

    Raises:
      UserError: the prompt is empty, or the record has no usable target.
    """
    vocabulary = self.vocabulary
    text_ids = [vocabulary.bos_id]
    for text in self.source_texts(record):
      text_ids += vocabulary.encode(text)
    text_ids.append(vocabulary.eos_id)
    if not with_target:
      return Encoded(text_ids, [])
    label_ids, confidence = self._target(record)
    if self.settings.eos:
      label_ids.append(vocabulary.eos_id)
    if not label_ids:
      raise UserError(
        f'{self.name} record "{record.id}" has an empty target; set'
        f" --config.tasks.{self.name}.eos=True to train on it"
      )
    return Encoded(text_ids, label_ids, confidence)

  @property
  def augments(self) -> bool:
    """Whether `augment` may change anything under these settings."""
    return False

  def augment(
    self, record: Record, rng: np.random.Generator
  ) -> tuple[Record, Change | None]:
    """Returns a randomly changed record, and the change of its picture.

    Args:
      rng: source of all randomness; not used unless `augments`.

    Raises:
      UserError: the record lacks what the change needs.
    """
    del rng
    return record, None

  def texts(self, record: Record) -> list[str]:
    """Returns every text of a record that is encoded: source and targets."""
    return [*self.source_texts(record), *self._target_texts(record)]

  @abc.abstractmethod
  def decode(
    self, ids: Sequence[int], original_size: tuple[int, int]
  ) -> str | Box:
    """Returns the answer for predicted ids.

    Args:
      ids: collapsed ids: repeats merged if `merge_repeats`, blanks dropped.
      original_size: (width, height) of the picture in pixels.
    """

  def answer_space(self) -> AnswerSpace | None:
    """Returns the answers that the task allows; None if any text is allowed.

    Raises:
      UserError: the task needs a list of answers and the settings name none.
    """
    return None

  def candidates(self) -> list[list[int]] | None:
    """Returns the ids without eos of every allowed answer.

    None for free texts and boxes.

    Raises:
      UserError: see `answer_space`.
    """
    space = self.answer_space()
    if space is None or not space.sequences:
      return None
    return [list(sequence) for sequence in space.sequences]

  @abc.abstractmethod
  def source_texts(self, record: Record) -> list[str]:
    """Returns the texts whose concatenated ids are the source."""

  @abc.abstractmethod
  def _target_texts(self, record: Record) -> list[str]:
    """Returns the texts of all valid targets."""

  @abc.abstractmethod
  def _target(self, record: Record) -> tuple[list[int], float]:
    """Returns the target's ids without eos, and its confidence."""

  def _require_prompt(self, text: str, record: Record) -> str:
    if not text and not self.settings.allow_empty:
      raise UserError(
        f'the prompt of {self.name} record "{record.id}" is empty (given:'
        f" {record.prompt!r}); pass some words with --prompt"
      )
    return text

  def _best_answer(self, record: Record) -> tuple[str, float]:
    """Returns the answer of the highest score, the first of equal ones."""
    answers = normalized_answers(record.answers)
    if not answers:
      raise UserError(f'{self.name} record "{record.id}" has no answer')
    answer = max(answers, key=answers.__getitem__)
    score = float(answers[answer])
    if not 0 < score <= 1:
      raise UserError(
        f'{self.name} record "{record.id}" has the answer {answer!r} with the'
        f" score {score:g}; it must be above 0 and at most 1"
      )
    return answer, score

  def _require_target(self, text: str, given: str, record: Record) -> str:
    if not text and not self.settings.allow_empty:
      raise UserError(
        f'the target of {self.name} record "{record.id}" is empty (given:'
        f" {given!r}); set --config.tasks.{self.name}.allow_empty=True to"
        " train on such ones"
      )
    return text


def limit_words(text: str, max_words: int) -> str:
  """Returns the first `max_words` space-separated words; 0 is no limit."""
  if not max_words:
    return text
  return " ".join(text.split(" ")[:max_words])


def clean_question(text: str, max_words: int = 0) -> str:
  """Returns a text in lower case with punctuation and spaces cleaned."""
  text = text.lower().lstrip(_LEADING).replace("-", " ").replace("/", " ")
  return _clean_spaces(text, max_words)


def clean_caption(text: str, max_words: int = 0) -> str:
  """As `clean_question`, and `<person>` becomes `person`."""
  text = text.lower().lstrip(_LEADING).replace("-", " ").replace("/", " ")
  return _clean_spaces(text.replace("<person>", "person"), max_words)


def _clean_spaces(text: str, max_words: int) -> str:
  text = _SPACES.sub(" ", text).rstrip("\n").strip(" ")
  return limit_words(text, max_words)


def delete_punctuation(text: str) -> str:
  """Deletes ASCII punctuation, and white space at both ends."""
  return text.translate(_NO_PUNCTUATION).strip()


def required_queries(label_ids: Sequence[int]) -> int:
  """Returns the queries that a target needs: one per label and per repeat."""
  repeats = sum(a == b for a, b in itertools.pairwise(label_ids))
  return len(label_ids) + repeats


def check_num_queries(
  samples: Mapping[str, Sequence[Encoded]], num_queries: int
) -> None:
  """Checks that some target of each task fits the number of queries.

  Raises:
    UserError: even the shortest target of a task needs more queries.
  """
  for name, encoded in samples.items():
    needed = [required_queries(e.label_ids) for e in encoded if e.label_ids]
    if needed and num_queries < min(needed):
      raise UserError(
        f'num_queries is {num_queries}, but the shortest target of "{name}"'
        f" needs {min(needed)} (the longest seen {max(needed)}); set"
        f" --config.model.num_queries={max(needed)}"
      )
