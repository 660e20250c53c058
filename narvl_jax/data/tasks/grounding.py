"""Visual grounding: from a picture and an expression to a box."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from narvl_jax.data.example import Box, Record
from narvl_jax.data.pictures import augmentation, images
from narvl_jax.data.tasks import base
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class GroundingSettings(base.Settings):
  """Settings of grounding.

  Attributes:
    prompt: template for the expression.
    max_source_words: longer expressions are cut; 0: no limit.
    clamp: move coordinates outside the picture to its border; otherwise they
      become unk, as in the reference.
    max_outside: `clamp` moves coordinates up to this many pixels outside; a
      record with others is bad.
    flip: mirror half of the training pictures, with box and words.
  """

  # Equal neighbours are two coordinates.
  merge_repeats: bool = False
  prompt: str = 'which region does the text " {} " describe?'
  max_source_words: int = 128
  clamp: bool = True
  max_outside: float = 1.0
  flip: bool = False


class GroundingTask(base.Task[GroundingSettings]):
  """An expression; the target is four bins: x0, y0, x1, y1."""

  name = "grounding"
  open_ended = False
  settings_class = GroundingSettings

  def __init__(
    self, vocabulary: Vocabulary | None, settings: GroundingSettings
  ) -> None:
    super().__init__(vocabulary, settings)
    if vocabulary is not None and vocabulary.num_bins < 2:
      raise UserError(
        f"grounding needs coordinate bins, the vocabulary has"
        f" {vocabulary.num_bins}; set --config.vocabulary.num_bins=64"
      )

  def decode(self, ids: Sequence[int], original_size: tuple[int, int]) -> Box:
    """Returns the box in pixels; zeros unless there are exactly 4 bins."""
    first, count = self.vocabulary.bin_start, self.vocabulary.num_bins
    bins = [i - first for i in ids if first <= i < first + count]
    if len(bins) != 4:
      return (0.0, 0.0, 0.0, 0.0)
    width, height = original_size
    x0, y0, x1, y1 = (k / (count - 1) for k in bins)
    return (x0 * width, y0 * height, x1 * width, y1 * height)

  def answer_space(self) -> base.AnswerSpace:
    """See `Task`: any four bins."""
    first, count = self.vocabulary.bin_start, self.vocabulary.num_bins
    return base.AnswerSpace(tokens=tuple(range(first, first + count)), count=4)

  def source_texts(self, record: Record) -> list[str]:
    """See `Task`."""
    settings = self.settings
    text = base.clean_caption(record.prompt, settings.max_source_words)
    self._require_prompt(text, record)
    return [" " + settings.prompt.format(text)]

  def _target_texts(self, record: Record) -> list[str]:
    del record
    return []

  def texts(self, record: Record) -> list[str]:
    """See `Task`; includes the texts of mirrored pictures."""
    texts = super().texts(record)
    if self.settings.flip:
      swapped = augmentation.swap_sides(record.prompt) or record.prompt
      mirrored = dataclasses.replace(record, prompt=swapped)
      texts += self.source_texts(mirrored)
    return texts

  def _target(self, record: Record) -> tuple[list[int], float]:
    box, size = self._checked_box(record)
    # In float32 as in the reference, because ties between bins depend on it.
    scale = np.float32(1) / np.asarray([*size, *size], np.float32)
    top = self.vocabulary.num_bins - 1
    bins = np.rint(np.asarray(box, np.float32) * scale * np.float32(top))
    if self.settings.clamp:
      bins = np.clip(bins, 0, top)
    first, unk_id = self.vocabulary.bin_start, self.vocabulary.unk_id
    ids = [first + int(k) if 0 <= k <= top else unk_id for k in bins.tolist()]
    return ids, 1.0

  @property
  def augments(self) -> bool:
    """See `Task`."""
    return self.settings.flip

  def augment(
    self, record: Record, rng: np.random.Generator
  ) -> tuple[Record, images.Change | None]:
    """See `Task`."""
    if not self.settings.flip or rng.random() < 0.5:
      return record, None
    prompt = augmentation.swap_sides(record.prompt)
    if prompt is None:
      return record, None
    (x0, y0, x1, y1), (width, _) = self._checked_box(record)
    box = (width - x1, y0, width - x0, y1)
    record = dataclasses.replace(record, prompt=prompt, box=box)
    return record, images.Change(flip=True)

  def _checked_box(self, record: Record) -> tuple[Box, tuple[int, int]]:
    """Returns the box of a record and its picture's (width, height)."""
    box = record.box
    name = f'{self.name} record "{record.id}"'
    if box is None:
      raise UserError(f"{name} has no box")
    sound = len(box) == 4 and all(math.isfinite(c) for c in box)
    if not sound or box[2] <= box[0] or box[3] <= box[1]:
      raise UserError(
        f"{name} has the box {_text(box)}; it must be x0, y0, x1, y1 in pixels"
        " with x0 < x1 and y0 < y1"
      )
    size = images.original_size(record.image)
    if self.settings.clamp:
      self._check_inside(box, size, name)
    return box, size

  def _check_inside(self, box: Box, size: tuple[int, int], name: str) -> None:
    width, height = size
    x0, y0, x1, y1 = box
    where = f"{name} has the box {_text(box)}"
    picture = f"its picture of {width} x {height} pixels"
    if max(x0, 0) >= min(x1, width) or max(y0, 0) >= min(y1, height):
      raise UserError(f"{where}, which lies wholly outside {picture}")
    outside = max(-x0, -y0, x1 - width, y1 - height)
    if outside > self.settings.max_outside:
      raise UserError(
        f"{where}, {outside:.6g} pixels outside {picture}; the limit is"
        f" {self.settings.max_outside:g}: set"
        f" --config.tasks.{self.name}.max_outside={math.ceil(outside)}"
      )


def _text(box: Sequence[float]) -> str:
  return "(" + ", ".join(f"{float(c):.6g}" for c in box) + ")"
