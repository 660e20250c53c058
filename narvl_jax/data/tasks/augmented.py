"""Augmentation of captioning and VQA."""

import abc
import dataclasses
from typing import TypeVar

import numpy as np

from narvl_jax.data.answer_text import normalized_answers
from narvl_jax.data.example import Record
from narvl_jax.data.pictures import augmentation, images
from narvl_jax.data.tasks import base


@dataclasses.dataclass(frozen=True)
class AugmentedSettings(base.Settings):
  """Settings that captions and questions share.

  Attributes:
    random_crop: smallest fraction of the picture's area that a random resized
      crop keeps; 0: off.
    color_jitter: largest relative change of brightness, contrast and
      saturation; 0: off.
    sample_answer: draw the target in proportion to the scores of the answers;
      otherwise the target is the answer with the highest score.
  """

  random_crop: float = dataclasses.field(default=0.0, metadata={"most": 1.0})
  color_jitter: float = dataclasses.field(default=0.0, metadata={"most": 1.0})
  sample_answer: bool = False


S = TypeVar("S", bound=AugmentedSettings)


class AugmentedTask(base.Task[S]):
  """A task with random crops, colors and answers."""

  @property
  def augments(self) -> bool:
    """See `Task`."""
    settings = self.settings
    return bool(
      settings.random_crop or settings.color_jitter or settings.sample_answer
    )

  def augment(
    self, record: Record, rng: np.random.Generator
  ) -> tuple[Record, images.Change | None]:
    """See `Task`."""
    settings = self.settings
    crop = color = None
    if settings.random_crop:
      crop = augmentation.random_crop(rng, settings.random_crop)
    if settings.color_jitter:
      color = augmentation.color_factors(rng, settings.color_jitter)
    if settings.sample_answer:
      record = self._with_drawn_answer(record, rng)
    if crop is None and color is None:
      return record, None
    return record, images.Change(crop=crop, color=color)

  def _with_drawn_answer(
    self, record: Record, rng: np.random.Generator
  ) -> Record:
    scores = {
      answer: float(score)
      for answer, score in normalized_answers(record.answers).items()
      if 0 < score <= 1 and self._target_text(answer).strip()
    }
    if not scores:
      # Encoding reports the fault.
      return record
    answer = augmentation.draw_answer(rng, scores)
    return dataclasses.replace(record, answers={answer: scores[answer]})

  @abc.abstractmethod
  def _target_text(self, answer: str) -> str:
    """Returns the target text of an answer without its leading space."""
