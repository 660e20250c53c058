"""Short descriptions of objects."""

from collections.abc import Iterable, Sequence

from narvl_jax.data.sources.shapes import words
from narvl_jax.data.sources.shapes.scene import SceneObject

# Descriptions from short to long.
SHORTEST_FIRST = (
  ("shape",),
  ("color",),
  ("color", "shape"),
  ("size", "shape"),
  ("texture", "shape"),
  ("size", "color", "shape"),
  ("texture", "color", "shape"),
  ("size", "texture", "shape"),
  ("size", "texture", "color", "shape"),
)


def say(item: SceneObject, attributes: Sequence[str]) -> str:
  """Returns the attributes as words: "large red circle", "small object"."""
  text = " ".join(getattr(item, name) for name in attributes)
  return text if attributes[-1] == "shape" else text + " object"


def is_unique(
  item: SceneObject, objects: Iterable[SceneObject], attributes: Sequence[str]
) -> bool:
  """Returns whether no other object has the same values."""
  for other in objects:
    if other is item:
      continue
    for name in attributes:
      if getattr(other, name) != getattr(item, name):
        break
    else:
      return False
  return True


def describe(
  item: SceneObject,
  objects: Sequence[SceneObject],
  candidates: Iterable[Sequence[str]] = SHORTEST_FIRST,
) -> str | None:
  """Returns the first candidate that describes only this object."""
  for attributes in candidates:
    if is_unique(item, objects, attributes):
      return say(item, attributes)
  return None


def is_on(side: str, item: SceneObject, anchor: SceneObject) -> bool:
  """Returns whether the item's centre lies on a side of the anchor's."""
  axis, sign = words.SIDES[side]
  return sign * (item.center(axis) - anchor.center(axis)) > 0


def distance(side: str, item: SceneObject, anchor: SceneObject) -> float:
  """Returns the distance of two centres along a side's axis in pixels."""
  axis = words.SIDES[side][0]
  return abs(item.center(axis) - anchor.center(axis))
