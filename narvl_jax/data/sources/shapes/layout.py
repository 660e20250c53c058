"""Places the objects of a scene.

Without overlap: a random tree splits the picture into cells, one per object
("guillotine" cuts), and each object lies anywhere in its cell. With overlap:
random places, rejected where too much of an object would be covered.
"""

import itertools
from collections.abc import Callable
from typing import Any

from narvl_jax.data.sources.shapes.scene import Draws, SceneObject

# Largest part of an object's box that later objects may cover, and the
# largest intersection over union of two boxes.
MAX_COVERED = 0.25
MAX_IOU = 0.15
_TRIES = 200


def place(draws: Draws, objects: list[SceneObject]) -> bool:
  """Sets x and y of the objects; False when no room was found.

  With overlap the objects are also put in drawing order.

  Centres of any two objects differ by at least `level.gap` along x, so that
  the order from left to right is clear (a screen is not counted).
  """
  level = draws.level
  for _ in range(_TRIES):
    if level.overlap:
      if _overlapping(draws, objects):
        return True
    elif _apart(draws, objects) and _ordered(objects, level.gap):
      return True
  return False


def _ordered(objects: list[SceneObject], gap: float) -> bool:
  centers = sorted(o.x + o.side / 2 for o in objects if o.shape != "screen")
  return all(b - a >= gap for a, b in itertools.pairwise(centers))


def _apart(draws: Draws, objects: list[SceneObject]) -> bool:
  size = draws.level.image_size
  margin = size / 32
  space = size - margin
  root = _split(draws.random, draws.shuffled(objects), margin)
  if root[0] > space or root[1] > space:
    return False
  _assign(draws.random, root, margin, margin, space, space, margin)
  return True


def _split(
  draw: Callable[[], float], objects: list[SceneObject], margin: float
) -> tuple[Any, ...]:
  """A tree of (width, height, ...) whose leaves are objects."""
  if len(objects) == 1:
    cell = objects[0].side + margin
    return cell, cell, objects[0]
  cut = 1 + int(draw() * (len(objects) - 1))
  first = _split(draw, objects[:cut], margin)
  second = _split(draw, objects[cut:], margin)
  if draw() < 0.5:
    width, height = first[0] + second[0], max(first[1], second[1])
    return width, height, None, 0, first, second
  width, height = max(first[0], second[0]), first[1] + second[1]
  return width, height, None, 1, first, second


def _assign(
  draw: Callable[[], float],
  node: tuple[Any, ...],
  x: float,
  y: float,
  width: float,
  height: float,
  margin: float,
) -> None:
  """Gives each leaf a place in the cell; margins lie right and below."""
  item = node[2]
  if item is not None:
    # Rounding down keeps to quarter pixels; cells start inside the margin.
    item.x = int(4 * (x + draw() * (width - node[0]))) / 4
    item.y = int(4 * (y + draw() * (height - node[1]))) / 4
    return
  _, _, _, axis, first, second = node
  if axis == 0:
    cut = first[0] + draw() * (width - first[0] - second[0])
    _assign(draw, first, x, y, cut, height, margin)
    _assign(draw, second, x + cut, y, width - cut, height, margin)
  else:
    cut = first[1] + draw() * (height - first[1] - second[1])
    _assign(draw, first, x, y, width, cut, margin)
    _assign(draw, second, x, y + cut, width, height - cut, margin)


def _overlapping(draws: Draws, objects: list[SceneObject]) -> bool:
  """Tries places one by one; large objects come first, so lie below."""
  draw, size, gap = draws.random, draws.level.image_size, draws.level.gap
  objects.sort(key=_by_side)
  covered = [0.0] * len(objects)
  for i, item in enumerate(objects):
    room = size - item.side - 2
    for _ in range(40):
      item.x = int(4 * (1 + draw() * room)) / 4
      center = item.x + item.side / 2
      for other in objects[:i]:
        if abs(other.x + other.side / 2 - center) < gap:
          break
      else:
        item.y = int(4 * (1 + draw() * room)) / 4
        shares = _cover(item, objects[:i], covered)
        if shares is not None:
          covered[:i] = shares
          break
    else:
      return False
  return True


def _by_side(item: SceneObject) -> int:
  return -item.side


def _cover(
  item: SceneObject, below: list[SceneObject], covered: list[float]
) -> list[float] | None:
  """Covered parts of the objects below, or None if one is too large."""
  shares = []
  x, y, side = item.x, item.y, item.side
  for other, share in zip(below, covered, strict=False):
    width = min(x + side, other.x + other.side) - max(x, other.x)
    if width > 0:
      height = min(y + side, other.y + other.side) - max(y, other.y)
      if height > 0:
        # Nothing may cover a screen; edges within one colour are unclear.
        if other.shape == "screen" or other.color == item.color:
          return None
        area = width * height
        share += area / other.side**2
        union = side**2 + other.side**2 - area
        if share > MAX_COVERED or area > MAX_IOU * union:
          return None
    shares.append(share)
  return shares
