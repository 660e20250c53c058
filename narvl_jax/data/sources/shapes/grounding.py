"""Referring expressions: a shortest description of exactly one object.

Kinds: "attribute" ("star", "red object", "large red square") and "relation"
("red square left of star"), for scenes in which two objects look the same.
"""

from narvl_jax.data.sources.shapes import phrases
from narvl_jax.data.sources.shapes.layout import place
from narvl_jax.data.sources.shapes.scene import Draft, Draws, draft

KINDS = ("attribute", "relation")
_RELATION_SHARE = {False: 0.15, True: 0.3}


def compose(draws: Draws) -> Draft:
  """Draws a scene with an expression and the box of its object."""
  relation = draws.chance(_RELATION_SHARE[draws.level.overlap])
  while True:
    found = _twins(draws) if relation else _plain(draws)
    if found is not None:
      return found


def _plain(draws: Draws) -> Draft | None:
  focus = draws.focus()
  count = draws.number_of_objects()
  objects = [focus, *draws.companions(focus, count - 1)]
  candidates = phrases.SHORTEST_FIRST
  if draws.chance(0.5):  # "red object" as often as "star"
    candidates = (candidates[1], candidates[0], *candidates[2:])
  expression = phrases.describe(focus, objects, candidates)
  objects = draws.shuffled(objects)
  if expression is None or not place(draws, objects):
    return None
  return draft(draws, objects, "attribute", expression, box=focus.box)


def _twins(draws: Draws) -> Draft | None:
  """Two equal objects and a third whose place distinguishes them."""
  level = draws.level
  focus = draws.focus()
  same = (focus.color, focus.shape)
  twin = draws.object(same, focus.size, focus.texture)
  anchor = draws.object(draws.combination(not_shape=focus.shape))
  objects = [focus, twin, anchor]
  if level.max_objects > 3 and draws.chance(0.5):
    other = draws.combination(not_shape=focus.shape)
    objects.append(draws.object(other))
  name = phrases.describe(anchor, objects)
  if name is None:
    return None
  side = draws.pick(level.sides)
  objects = draws.shuffled(objects)
  for _ in range(20):
    if not place(draws, objects):
      return None
    if (
      phrases.is_on(side, focus, anchor)
      and not phrases.is_on(side, twin, anchor)
      and phrases.distance(side, focus, anchor) >= level.gap
      and phrases.distance(side, twin, anchor) >= level.gap
    ):
      break
  else:
    return None
  attributes = ("color", "shape")
  if not all(
    phrases.is_unique(focus, [other], attributes)
    for other in objects
    if other is not focus and other is not twin
  ):
    return None
  expression = f"{phrases.say(focus, attributes)} {side} {name}"
  return draft(draws, objects, "relation", expression, box=focus.box)
