"""Hypotheses about a picture in which a grey screen may hide an object.

The answer is "yes" if the visible objects prove the hypothesis and "no" if they
refute it. Without a screen every object is visible. With a screen a hypothesis
about an object that is not visible is "maybe". The three answers are equally
frequent, and neither the words nor the screen alone predict them.
"""

from narvl_jax.data.sources.shapes import phrases, words
from narvl_jax.data.sources.shapes.layout import finish, place
from narvl_jax.data.sources.shapes.scene import Draft, Draws, SceneObject, draft
from narvl_jax.data.sources.shapes.vqa import (
  absent_combination,
  several,
  with_count,
)

KINDS = ("existence", "color", "size", "count", "relation", "texture")
LABELS = ("yes", "no", "maybe")


def compose(draws: Draws) -> Draft:
  """Draws a scene with a hypothesis and its label."""
  textured = len(draws.level.textures) > 1
  kind = draws.pick(KINDS if textured else KINDS[:5])
  label = draws.pick(LABELS)
  while True:
    if kind in ("size", "texture"):
      found = _trait(draws, label, kind)
    else:
      found = _COMPOSE[kind](draws, label)
    if found is not None:
      return found


def _finish(
  draws: Draws,
  objects: list[SceneObject],
  screen: bool,
  kind: str,
  hypothesis: str,
  label: str,
) -> Draft | None:
  panel = draws.screen() if screen else None
  return finish(draws, objects, kind, hypothesis, label, panel)


def _objects(draws: Draws, screen: bool) -> list[SceneObject]:
  """Draws the focus and companions, with room left for the screen."""
  focus = draws.focus()
  limit = draws.level.max_objects
  if screen:
    limit -= 2 if draws.level.overlap else 1
  return [focus, *draws.others(focus, draws.below(limit))]


def _existence(draws: Draws, label: str) -> Draft | None:
  screen = label == "maybe" or (label == "yes" and draws.chance(0.5))
  objects = _objects(draws, screen)
  focus = objects[0]
  pair = (focus.color, focus.shape)
  if label != "yes":
    pair = absent_combination(draws, focus, objects)
    if pair is None:
      return None
  hypothesis = f"there is a {pair[0]} {pair[1]}"
  return _finish(draws, objects, screen, "existence", hypothesis, label)


def _color(draws: Draws, label: str) -> Draft | None:
  """Such as "the circle is red"."""
  screen = label == "maybe" or draws.chance(0.5)
  objects = _objects(draws, screen)
  focus = objects[0]
  color, shape = focus.color, focus.shape
  if label != "yes":
    pair = absent_combination(draws, focus, objects)
    if pair is None:
      return None
    color, shape = pair
  seen = [item for item in objects if item.shape == shape]
  if len(seen) != (label != "maybe"):
    return None
  hypothesis = f"the {shape} is {color}"
  return _finish(draws, objects, screen, "color", hypothesis, label)


def _trait(draws: Draws, label: str, trait: str) -> Draft | None:
  """Such as "the circle is large" or "the red circle is striped"."""
  screen = label == "maybe" or draws.chance(0.5)
  objects = _objects(draws, screen)
  value = draws.pick(words.SIZES if trait == "size" else draws.level.textures)
  attributes = draws.pick((("shape",), ("color", "shape")))
  focus = objects[0]
  if label == "maybe":
    pair = absent_combination(draws, focus, objects)
    if pair is None:
      return None
    focus = draws.object(pair)
  elif (getattr(focus, trait) == value) != (label == "yes"):
    return None
  if not phrases.is_unique(focus, objects, attributes):
    return None
  hypothesis = f"the {phrases.say(focus, attributes)} is {value}"
  return _finish(draws, objects, screen, trait, hypothesis, label)


def _count(draws: Draws, label: str) -> Draft | None:
  """Such as "there are 2 circles": exactly 2, hidden ones included."""
  limit = draws.level.max_objects
  stated = 2 + draws.below(limit - 1)
  screen = label == "maybe"
  number = stated
  if label == "maybe":
    number = stated - 1
  elif label == "no":
    number = stated + draws.pick((-1, 1) if stated < limit else (-1,))
    # More than stated are visible: false, with any hidden objects.
    screen = number > stated and draws.chance(0.5)
  total = number + draws.below(max(1, limit - screen - number + 1))
  attribute = draws.pick(("shape", "color"))
  objects, value = with_count(draws, attribute, number, total)
  if screen and total + 1 >= limit:
    for item in objects:
      draws.shrink(item)
  hypothesis = f"there are {stated} {several(attribute, value)}"
  return _finish(draws, objects, screen, "count", hypothesis, label)


def _relation(draws: Draws, label: str) -> Draft | None:
  """Such as "the red circle is left of the blue star"."""
  level = draws.level
  screen = label == "maybe" or draws.chance(0.5)
  objects = _objects(draws, screen)
  focus = objects[0]
  if label == "maybe":
    # Named like a companion, so the words do not reveal the label.
    other = draws.companions(focus, 1)[0]
    named = [*objects, other]
  elif len(objects) > 1:
    other, named = objects[1], objects
  else:
    return None
  full = ("color", "shape")
  if not all(phrases.is_unique(item, named, full) for item in (focus, other)):
    return None
  panel = draws.screen() if screen else None
  objects = draws.shuffled(objects)
  if not place(draws, objects, panel):
    return None
  names = phrases.say(focus, full), phrases.say(other, full)
  # An unseen object can only be behind the screen.
  first, second = focus, panel if label == "maybe" and panel else other
  if draws.chance(0.5):
    first, second, names = second, first, names[::-1]
  for side in draws.shuffled(level.sides):
    if (
      phrases.is_on(side, first, second) == (label != "no")
      and phrases.distance(side, first, second) >= level.gap
    ):
      hypothesis = f"the {names[0]} is {side} the {names[1]}"
      return draft(draws, objects, "relation", hypothesis, label, screen=panel)
  return None


_COMPOSE = {
  "existence": _existence,
  "color": _color,
  "count": _count,
  "relation": _relation,
}
