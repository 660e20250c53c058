"""Captioning: from a picture to a sentence."""

import dataclasses
from collections.abc import Sequence

from narvl_jax.data.answer_text import normalize_answer
from narvl_jax.data.example import Record
from narvl_jax.data.tasks import augmented, base


@dataclasses.dataclass(frozen=True)
class CaptionSettings(augmented.AugmentedSettings):
  """Settings of captioning.

  Attributes:
    max_target_words: longer targets are cut; 0: no limit.
  """

  prompt: str = "what does the image describe?"
  max_target_words: int = 20


class CaptionTask(augmented.AugmentedTask[CaptionSettings]):
  """A fixed prompt; the target is the first reference without punctuation."""

  name = "caption"
  settings_class = CaptionSettings

  def decode(self, ids: Sequence[int], original_size: tuple[int, int]) -> str:
    """Returns the caption without ASCII punctuation."""
    del original_size
    return base.delete_punctuation(self.vocabulary.decode(ids))

  def source_texts(self, record: Record) -> list[str]:
    """See `Task`."""
    del record
    return [" " + self.settings.prompt]

  def _target_texts(self, record: Record) -> list[str]:
    return [" " + self._target_text(answer) for answer in record.answers]

  def _target(self, record: Record) -> tuple[list[int], float]:
    caption, confidence = self._best_answer(record)
    text = self._target_text(caption)
    self._require_target(text, caption, record)
    ids = self.vocabulary.encode(" " + text) if text else []
    return ids, confidence

  def _target_text(self, answer: str) -> str:
    words = base.delete_punctuation(normalize_answer(answer)).split()
    return " ".join(words[: self.settings.max_target_words or None])
