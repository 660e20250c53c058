"""Visual entailment: whether a picture (and its caption) imply a sentence."""

import dataclasses
from collections.abc import Sequence

from narvl_jax.data.example import Record
from narvl_jax.data.tasks import base
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError, did_you_mean

ANSWERS = ("yes", "no", "maybe")
ANSWER_OF_LABEL = {
  "entailment": "yes",
  "contradiction": "no",
  "neutral": "maybe",
}


@dataclasses.dataclass(frozen=True)
class EntailmentSettings(base.Settings):
  """Settings of entailment.

  Attributes:
    prompt: template for the hypothesis.
    premise_prompt: template for the premise and the hypothesis.
    add_caption: use the premise. A record without one uses `prompt`, unless
      `allow_empty`.
    max_source_words: longer texts are cut; 0: no limit.
  """

  merge_repeats: bool = False
  decoder_prompt: bool = True
  prompt: str = 'does the image describe " {} "?'
  premise_prompt: str = 'can image and text1 " {} " imply text2 " {} "?'
  add_caption: bool = True
  max_source_words: int = 80


class EntailmentTask(base.Task[EntailmentSettings]):
  """A hypothesis and an optional premise; the target is yes, no or maybe."""

  name = "entailment"
  open_ended = False
  settings_class = EntailmentSettings

  def __init__(
    self, vocabulary: Vocabulary | None, settings: EntailmentSettings
  ) -> None:
    super().__init__(vocabulary, settings)
    if vocabulary is not None:
      # 1 in the official vocabulary.
      self._answer_length = max(
        len(vocabulary.encode(" " + answer)) for answer in ANSWERS
      )

  def decode(self, ids: Sequence[int], original_size: tuple[int, int]) -> str:
    """Returns the first symbol without spaces."""
    del original_size
    vocabulary = self.vocabulary
    silent = (
      vocabulary.bos_id,
      vocabulary.pad_id,
      vocabulary.eos_id,
      vocabulary.blank_id,
    )
    symbols = [i for i in ids if i not in silent]
    answer = vocabulary.decode(symbols[: self._answer_length])
    return answer.replace(" ", "")

  def answer_space(self) -> base.AnswerSpace:
    """See `Task`: yes, no and maybe."""
    encode = self.vocabulary.encode
    return base.AnswerSpace(
      sequences=tuple(tuple(encode(" " + answer)) for answer in ANSWERS)
    )

  def source_texts(self, record: Record) -> list[str]:
    """See `Task`."""
    settings = self.settings
    limit = settings.max_source_words
    hypothesis = base.clean_caption(record.prompt, limit)
    self._require_prompt(hypothesis, record)
    premise = base.clean_caption(record.premise, limit)
    if settings.add_caption and (premise or settings.allow_empty):
      return [" " + settings.premise_prompt.format(premise, hypothesis)]
    return [" " + settings.prompt.format(hypothesis)]

  def _target_texts(self, record: Record) -> list[str]:
    del record
    return [" " + answer for answer in ANSWERS]

  def _target(self, record: Record) -> tuple[list[int], float]:
    answer, confidence = self._best_answer(record)
    if answer not in ANSWERS:
      raise UserError(
        f'entailment record "{record.id}" has the answer {answer!r}.'
        f"{did_you_mean(answer, ANSWERS)}"
      )
    return self.vocabulary.encode(" " + answer), confidence
