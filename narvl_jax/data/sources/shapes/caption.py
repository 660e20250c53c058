"""Captions that name every object from left to right.

A scene has one caption: "a {size} {texture} {color} {shape}" for each object,
in the order of the centres along x, joined by " and ". "solid" is left out.
"""

from narvl_jax.data.sources.shapes.layout import place
from narvl_jax.data.sources.shapes.scene import Draft, Draws, SceneObject, draft

KINDS = ("1 object", "2 objects", "3 objects", "4 objects", "5 objects")


def caption(objects: list[SceneObject]) -> str:
  """Returns the caption of placed objects."""
  parts = []
  for item in sorted(objects, key=lambda o: o.x + o.side / 2):
    texture = "" if item.texture == "solid" else item.texture + " "
    parts.append(f"a {item.size} {texture}{item.color} {item.shape}")
  return " and ".join(parts)


def compose(draws: Draws) -> Draft:
  """Draws a scene with its caption."""
  count = draws.number_of_objects()
  while True:
    focus = draws.focus()
    objects = [focus, *draws.companions(focus, count - 1)]
    objects = draws.shuffled(objects)
    if place(draws, objects):
      return draft(draws, objects, KINDS[count - 1], answer=caption(objects))
