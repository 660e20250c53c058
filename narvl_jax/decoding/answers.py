"""The answers that a task allows, as a hashable value."""

import dataclasses

import numpy as np

from narvl_jax.decoding.constraint import Automaton, answer_trie, repeated
from narvl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class AnswerSet:
  """A closed list of answers, or a number of free choices.

  It is hashable, so that compiled programs can be cached by it.

  Attributes:
    name: name of the task, for messages.
    sequences: token ids of every answer; empty if there is no list.
    tokens: without a list, the ids that each of `count` places may hold.
    then: ids that end every answer, such as eos.
  """

  name: str
  sequences: tuple[tuple[int, ...], ...] = ()
  tokens: tuple[int, ...] = ()
  count: int = 0
  then: tuple[int, ...] = ()

  @property
  def closed(self) -> bool:
    """Whether there is a list, so that all answers can be scored."""
    return bool(self.sequences)

  @property
  def shortest(self) -> int:
    """Number of tokens of the shortest answer, without `then`."""
    return min(map(len, self.sequences), default=self.count)

  def automaton(self) -> Automaton:
    """Returns the constraint.

    Raises:
      UserError: it allows nothing.
    """
    if self.closed:
      return answer_trie([(*answer, *self.then) for answer in self.sequences])
    return repeated(self.tokens, self.count, self.then)


def pad_answers(
  answers: AnswerSet, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns a closed set as ids int32 [C, L] and lengths int32 [C].

  Raises:
    UserError: there is no list of answers.
  """
  if not answers.closed:
    raise UserError(
      f"{answers.name} has no list of answers to choose from, so"
      " --decoding=candidates cannot be used; nearest: --decoding=beam"
      " --constrained"
    )
  rows = [(*answer, *answers.then) for answer in answers.sequences]
  lengths = np.asarray([len(row) for row in rows], np.int32)
  ids = np.full((len(rows), lengths.max()), pad_id, np.int32)
  for row, answer in zip(ids, rows, strict=True):
    row[: len(answer)] = answer
  return ids, lengths
