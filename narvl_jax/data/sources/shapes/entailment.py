"""Hypotheses about a picture in which a grey screen may hide something.

The answer is "yes" if the visible objects prove the hypothesis, "no" if they
refute it. A picture without a screen shows everything there is, so what is not
seen there is not there. Behind a screen there may be more, so a hypothesis
about an object that is not seen is neither proven nor refuted: "maybe".
The same words thus get each of the three answers equally often, and neither
the words nor the screen alone tell which.
"""

from narvl_jax.data.sources.shapes import phrases, words
from narvl_jax.data.sources.shapes.layout import place
from narvl_jax.data.sources.shapes.scene import (
  Draft,
  Draws,
  SceneObject,
  draft,
)
from narvl_jax.data.sources.shapes.vqa import absent_combination, with_count

KINDS = ("existence", "color", "size", "count", "relation")
LABELS = ("yes", "no", "maybe")


def compose(draws: Draws) -> Draft:
  """One scene with a hypothesis and its label."""
  kinds = (_existence, _color, _size, _count, _relation)
  kind = kinds[draws.below(5)]
  label = draws.pick(LABELS)
  while True:
    found = kind(draws, label)
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
  objects = draws.shuffled(objects)
  if not place(draws, objects if panel is None else [*objects, panel]):
    return None
  return draft(draws, objects, kind, hypothesis, label, screen=panel)


def _objects(draws: Draws, screen: bool) -> list[SceneObject]:
  """The focus and companions, with room left for the screen."""
  focus = draws.focus()
  limit = draws.level.max_objects - screen
  return [focus, *draws.companions(focus, draws.below(limit))]


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
  """ "the circle is red"."""
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


def _size(draws: Draws, label: str) -> Draft | None:
  """ "the circle is large", "the red circle is large"."""
  screen = label == "maybe" or draws.chance(0.5)
  objects = _objects(draws, screen)
  focus = objects[0]
  size = draws.pick(words.SIZES)
  pair = (focus.color, focus.shape)
  if label == "maybe":
    pair = absent_combination(draws, focus, objects)
    if pair is None:
      return None
  both = draws.chance(0.5)
  seen = [
    item
    for item in objects
    if item.shape == pair[1] and (not both or item.color == pair[0])
  ]
  if len(seen) != (label != "maybe"):
    return None
  if seen and (seen[0].size == size) != (label == "yes"):
    return None
  name = f"{pair[0]} {pair[1]}" if both else pair[1]
  hypothesis = f"the {name} is {size}"
  return _finish(draws, objects, screen, "size", hypothesis, label)


def _count(draws: Draws, label: str) -> Draft | None:
  """ "there are 2 circles": exactly so many, hidden ones included."""
  limit = draws.level.max_objects
  stated = 2 + draws.below(limit - 1)
  # More than stated are seen: false, whatever the screen hides.
  screen = label == "maybe"
  if label == "yes":
    number = stated
  elif label == "maybe":
    number = stated - 1
  else:
    number = stated + draws.pick((-1, 1))
    if number > limit:
      return None
    screen = number > stated and number < limit and draws.chance(0.5)
  total = number + draws.below(limit - screen - number + 1)
  attribute = "shape" if draws.chance(0.5) else "color"
  objects, value = with_count(draws, attribute, number, total)
  noun = words.PLURALS[value] if attribute == "shape" else value + " objects"
  hypothesis = f"there are {stated} {noun}"
  return _finish(draws, objects, screen, "count", hypothesis, label)


def _relation(draws: Draws, label: str) -> Draft | None:
  """ "the red circle is left of the star"."""
  level = draws.level
  screen = label == "maybe" or draws.chance(0.5)
  objects = _objects(draws, screen)
  focus = objects[0]
  if label == "maybe":
    pair = absent_combination(draws, focus, objects)
    other = None if pair is None else draws.object(pair)
    panel = other
  elif len(objects) > 1:
    other = objects[1]
  else:
    return None
  if other is None:
    return None
  # Every pair is named in full, seen or not.
  full = ("color", "shape")
  named = [*objects, other] if label == "maybe" else objects
  if not all(phrases.is_unique(item, named, full) for item in (focus, other)):
    return None
  panel = draws.screen() if screen else None
  objects = draws.shuffled(objects)
  if not place(draws, objects if panel is None else [*objects, panel]):
    return None
  names = phrases.say(focus, full), phrases.say(other, full)
  # An unseen object can only be behind the screen.
  where = panel if label == "maybe" and panel is not None else other
  first, second = focus, where
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
