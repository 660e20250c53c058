"""Places the objects of a scene.

Without overlap: a random tree splits the picture into cells, one per object
("guillotine" cuts), and each object lies anywhere in its cell. With overlap:
random places, rejected where too much of an object would be covered.
"""

import itertools
from collections.abc import Callable
from typing import Any

from narvl_jax.data.sources.shapes.scene import Draft, Draws, SceneObject, draft

# Largest part of an object's box that later objects may cover, and the
# largest intersection over union of two boxes.
MAX_COVERED = 0.25
MAX_IOU = 0.15
_TRIES = 200


def finish(
  draws: Draws,
  objects: list[SceneObject],
  kind: str,
  prompt: str | None,
  answer: str,
  panel: SceneObject | None = None,
) -> Draft | None:
  """Shuffles and places objects; None without a prompt, or without room."""
  if prompt is None:
    return None
  objects = draws.shuffled(objects)
  if not place(draws, objects, panel):
    return None
  return draft(draws, objects, kind, prompt, answer, screen=panel)


def place(
  draws: Draws, objects: list[SceneObject], panel: SceneObject | None = None
) -> bool:
  """Sets x and y of the objects and a panel; False when no room was found.

  With overlap the objects are also put in drawing order.

  Centres of any two objects differ by at least `level.gap` along x, so that
  the order from left to right is clear (a screen is not counted).
  """
  level = draws.level
  everything = objects if panel is None else [panel, *objects]
  for _ in range(_TRIES):
    if level.overlap:
      found = _overlapping(draws, everything)
    else:
      found = _apart(draws, everything) and _ordered(everything, level.gap)
    if found:
      objects[:] = [item for item in everything if item is not panel]
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
  draw, size, gap = draws.random, draws.level.image_size, 2 * draws.level.gap
  objects.sort(key=_by_side)
  below: list[tuple[float, float, float, float, str]] = []
  covered: list[float] = []
  centers: list[float] = []  # Along x, doubled.
  for item in objects:
    side = item.side
    room = size - side - 2
    for _ in range(16):
      x = int(4 * (1 + draw() * room)) / 4
      center = 2 * x + side
      for other in centers:
        if -gap < other - center < gap:
          break
      else:
        y = int(4 * (1 + draw() * room)) / 4
        box = (x, y, x + side, y + side, item.color)
        shares = _cover(box, below, covered)
        if shares is not None:
          covered = [*shares, 0.0]
          below.append(box)
          centers.append(center)
          item.x, item.y = x, y
          break
    else:
      return False
  return True


def _by_side(item: SceneObject) -> int:
  return -item.side


def _cover(
  box: tuple[float, float, float, float, str],
  below: list[tuple[float, float, float, float, str]],
  covered: list[float],
) -> list[float] | None:
  """Covered parts of the boxes below, or None if one is too large."""
  x0, y0, x1, y1, color = box
  shares = covered
  for i, (left, top, right, bottom, other) in enumerate(below):
    if left < x1 and x0 < right and top < y1 and y0 < bottom:
      # Nothing may cover a screen; edges within one colour are unclear.
      if not other or other == color:
        return None
      # Spelt out, since this runs 45 times a record: no min and max.
      area = ((x1 if x1 < right else right) - (x0 if x0 > left else left)) * (
        (y1 if y1 < bottom else bottom) - (y0 if y0 > top else top)
      )
      whole = (right - left) * (bottom - top)
      share = covered[i] + area / whole
      union = (x1 - x0) * (y1 - y0) + whole - area
      if share > MAX_COVERED or area > MAX_IOU * union:
        return None
      if shares is covered:
        shares = covered.copy()
      shares[i] = share
  return shares
