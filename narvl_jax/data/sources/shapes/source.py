"""The procedural source `shapes`: records drawn from (split, seed, index)."""

from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.sources.base import RecordSource
from narvl_jax.data.sources.shapes import (
  caption,
  drawing,
  entailment,
  grounding,
  vqa,
)
from narvl_jax.data.sources.shapes.scene import Draft, Draws, make_level
from narvl_jax.errors import UserError, did_you_mean

# First key and number of records of each split; the ranges are disjoint.
RANGES = {
  "train": (0, 2**31),
  "validation": (2**32, 4000),
  "test": (2**33, 4000),
  "held_out": (2**34, 4000),
}
DIFFICULTIES = ("easy", "full")
IMAGE_SIZES = (32, 512)

_COMPOSE = {
  "caption": caption.compose,
  "vqa": vqa.compose,
  "grounding": grounding.compose,
  "entailment": entailment.compose,
}


class ShapesSource(RecordSource):
  """Scenes of 1-5 objects with text about them, made on demand.

  Record `i` is a function of (task, split, seed, i) and the options. Its random
  numbers come from one integer, in which seed, task and the split's keys have
  separate bits. So no two splits or seeds share a scene.

  Attributes:
    split: "train" (2**31 records), "validation", "test" or "held_out" (4000
      each). Only scenes of "held_out" have a combination of `words.HELD_OUT`.
    seed: another seed draws other records of the same distribution.
    image_size: side of the square pictures in pixels.
    difficulty: "easy" (1-3 separate solid objects) or "full" (1-5 objects,
      textures, overlap, more relations).
    endless: whether the split is too long for any run.
  """

  def __init__(
    self,
    *,
    task: str,
    split: str,
    seed: int = 0,
    image_size: int = 48,
    difficulty: str = "easy",
  ) -> None:
    """Checks the options.

    Raises:
      UserError: unknown task, split or difficulty; bad image size or seed.
    """
    for name, value, options, where in (
      ("task", task, TASKS, "--task, or data.train.NAME.task"),
      ("split", split, RANGES, "--split, or data.train.NAME.split"),
      ("difficulty", difficulty, DIFFICULTIES, "options.difficulty"),
    ):
      if value not in options:
        raise UserError(
          f'shapes: unknown {name} "{value}".'
          f"{did_you_mean(str(value), options)} Set {where}."
        )
    low, high = IMAGE_SIZES
    if type(image_size) is not int or not low <= image_size <= high:
      raise UserError(
        f"shapes: image_size must be a whole number from {low} to {high}, "
        f"got {image_size!r}. Set options.image_size."
      )
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
      raise UserError(
        "shapes: seed must be a whole number from 0 to 2**64 - 1, got "
        f"{seed!r}. Set seed."
      )
    self.task, self.split, self.seed = task, split, seed
    self.image_size, self.difficulty = image_size, difficulty
    self._level = make_level(difficulty, image_size, split == "held_out")
    self._first, self._count = RANGES[split]
    self.endless = split == "train"
    self._base = (seed << 40) + (TASKS.index(task) << 36) + self._first
    self._compose = _COMPOSE[task]

  def __len__(self) -> int:
    return self._count

  def _read(self, number: int) -> Record:
    draft = self.draft(number)
    return Record(
      id=f"shapes-{self.split}-{number}",
      task=self.task,
      image=drawing.render(draft.scene, self.image_size),
      prompt=draft.prompt,
      answers={draft.answer: 1.0} if draft.answer else {},
      box=draft.box,
      kind=draft.kind,
    )

  def key(self, index: int) -> int:
    """Returns the integer that seeds all random numbers of a record."""
    return self._base + self._number(index)

  def draft(self, index: int) -> Draft:
    """Returns scene and text of a record without the picture."""
    return self._compose(Draws(self.key(index), self._level))
