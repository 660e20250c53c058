"""Objects, scenes and the random numbers that make them."""

import dataclasses
import random
from collections.abc import Sequence
from typing import TypeVar

from narvl_jax.data.example import Box
from narvl_jax.data.sources.shapes import words

T = TypeVar("T")


@dataclasses.dataclass(slots=True)
class SceneObject:
  """One object; the attributes are words, lengths are in pixels.

  Attributes:
    size: "small" or "large".
    texture: one of `words.TEXTURES`.
    color: one of `words.COLORS`; empty for the grey screen.
    shape: one of `words.SHAPES`, or "screen".
    side: width and height of the tight box, whole pixels.
    x: left edge, a multiple of a quarter pixel.
    y: upper edge in pixels.
    variant: number of the shade of its colour.
  """

  size: str
  texture: str
  color: str
  shape: str
  side: int
  x: float = 0.0
  y: float = 0.0
  variant: int = 0

  @property
  def box(self) -> Box:
    """The tight box x0, y0, x1, y1."""
    return self.x, self.y, self.x + self.side, self.y + self.side

  def center(self, axis: int) -> float:
    """The centre on an axis, 0 = x and 1 = y."""
    return (self.y if axis else self.x) + self.side / 2


@dataclasses.dataclass(slots=True)
class Scene:
  """A picture to draw; later objects cover earlier ones."""

  objects: list[SceneObject]
  screen: SceneObject | None
  background: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Level:
  """Limits of scenes for a difficulty and an image size.

  Attributes:
    image_size: side of the square picture in pixels.
    sides: relations in use, keys of `words.SIDES`.
    small: whole-pixel sides of small objects.
    large: whole-pixel sides of large objects.
    gap: smallest distance of two objects' centres along x.
    large_share: probability that an object is large, unless given.
    held_out: every scene has a held-out combination.
  """

  image_size: int
  max_objects: int
  textures: tuple[str, ...]
  sides: tuple[str, ...]
  overlap: bool
  small: tuple[int, ...]
  large: tuple[int, ...]
  gap: float
  large_share: float
  held_out: bool


def make_level(difficulty: str, image_size: int, held_out: bool) -> Level:
  """Returns the level for a difficulty, "easy" or "full"."""
  full = difficulty == "full"

  def lengths(low: float, high: float) -> tuple[int, ...]:
    first, last = round(low * image_size / 48), round(high * image_size / 48)
    count = min(4, last - first + 1)
    return tuple(
      first + round(i * (last - first) / max(1, count - 1))
      for i in range(count)
    )

  return Level(
    image_size=image_size,
    max_objects=5 if full else 3,
    textures=words.TEXTURES if full else words.TEXTURES[:1],
    sides=tuple(words.SIDES)[: 4 if full else 2],
    overlap=full,
    small=lengths(11, 13),
    large=lengths(18, 21),
    gap=image_size * (2 if full else 3) / 48,
    large_share=0.25 if full else 0.5,
    held_out=held_out,
  )


class Draws:
  """Random draws of one record.

  Only `random.Random.random` is used, because its sequence for an integer seed
  is the same in every Python version.
  """

  __slots__ = ("level", "random")

  def __init__(self, key: int, level: Level) -> None:
    # Seeding repeats short keys, so keys of different lengths could start the
    # same sequence. The top bit makes all keys equally long.
    self.random = random.Random(key + (1 << 128)).random
    self.level = level

  def below(self, limit: int) -> int:
    """Returns an integer in [0, limit)."""
    return int(self.random() * limit)

  def pick(self, options: Sequence[T]) -> T:
    """Returns one of the options."""
    return options[int(self.random() * len(options))]

  def chance(self, probability: float) -> bool:
    """Returns True with the given probability."""
    return self.random() < probability

  def shuffled(self, items: Sequence[T]) -> list[T]:
    """Returns the items in random order."""
    out = list(items)
    for i in range(len(out) - 1, 0, -1):
      j = int(self.random() * (i + 1))
      out[i], out[j] = out[j], out[i]
    return out

  def combination(
    self,
    pool: Sequence[tuple[str, str]] = words.SEEN,
    *,
    color: str = "",
    shape: str = "",
    not_color: str = "",
    not_shape: str = "",
  ) -> tuple[str, str]:
    """Returns a (color, shape) of the pool that meets the conditions."""
    while True:
      found = pool[int(self.random() * len(pool))]
      if (
        (not color or found[0] == color)
        and (not shape or found[1] == shape)
        and found[0] != not_color
        and found[1] != not_shape
      ):
        return found

  def object(
    self, combination: tuple[str, str], size: str = "", texture: str = ""
  ) -> SceneObject:
    """Returns an object of that color and shape without a place."""
    level = self.level
    size = size or words.SIZES[self.random() < level.large_share]
    lengths = level.small if size == "small" else level.large
    if not texture:
      texture = level.textures[int(self.random() * len(level.textures))]
    return SceneObject(
      size,
      texture,
      combination[0],
      combination[1],
      lengths[int(self.random() * len(lengths))],
      variant=int(self.random() * 16),
    )

  def focus(self) -> SceneObject:
    """Returns the object that a request is about; held out if the scene is."""
    pool = words.HELD_OUT if self.level.held_out else words.SEEN
    size = words.SIZES[int(self.random() * 2)]
    return self.object(self.combination(pool), size)

  def alike(self, attribute: str, value: str) -> SceneObject:
    """Returns an object with the given color or shape."""
    if attribute == "color":
      return self.object(self.combination(color=value))
    return self.object(self.combination(shape=value))

  def unlike(self, attribute: str, value: str) -> SceneObject:
    """Returns an object with any other color or shape."""
    if attribute == "color":
      return self.object(self.combination(not_color=value))
    return self.object(self.combination(not_shape=value))

  def number_of_objects(self) -> int:
    """Returns the number of objects of the scene, uniformly distributed."""
    return 1 + int(self.random() * self.level.max_objects)

  def companions(self, focus: SceneObject, count: int) -> list[SceneObject]:
    """Returns objects that often share the focus's color or shape."""
    out = []
    for _ in range(count):
      share = self.random()
      if share < 0.3:
        combination = self.combination(color=focus.color)
      elif share < 0.6:
        combination = self.combination(shape=focus.shape)
      else:
        combination = self.combination()
      out.append(self.object(combination))
    return out

  def others(self, focus: SceneObject, count: int) -> list[SceneObject]:
    """Returns companions in a third of the scenes, otherwise any objects."""
    if self.random() < 1 / 3:
      return self.companions(focus, count)
    return [self.object(self.combination()) for _ in range(count)]

  def shrink(self, item: SceneObject) -> None:
    """Makes an object small."""
    item.size, item.side = "small", self.pick(self.level.small)

  def screen(self) -> SceneObject:
    """Returns a grey panel that may hide an object."""
    return SceneObject("large", "solid", "", "screen", self.level.large[-1])

  def background(self) -> tuple[int, int, int, int]:
    """Returns tile, offsets and brightness of the background."""
    draw = self.random
    return (
      int(draw() * 16),
      int(draw() * 32),
      int(draw() * 32),
      int(draw() * 32),
    )


@dataclasses.dataclass(slots=True)
class Draft:
  """A record before its picture is drawn; see `Record`."""

  scene: Scene
  kind: str
  prompt: str = ""
  answer: str = ""
  box: Box | None = None


def draft(
  draws: Draws,
  objects: list[SceneObject],
  kind: str,
  prompt: str = "",
  answer: str = "",
  *,
  box: Box | None = None,
  screen: SceneObject | None = None,
) -> Draft:
  """Returns a draft of placed objects on a background."""
  scene = Scene(objects, screen, draws.background())
  return Draft(scene, kind, prompt, answer, box)
