"""Questions with answers that the words alone do not give away."""

from narvl_jax.data.sources.shapes import phrases, words
from narvl_jax.data.sources.shapes.layout import place
from narvl_jax.data.sources.shapes.phrases import describe
from narvl_jax.data.sources.shapes.scene import (
  Draft,
  Draws,
  SceneObject,
  draft,
)

KINDS = ("count", "attribute", "existence", "comparison", "relation")

_YES_NO = {True: "yes", False: "no"}


def compose(draws: Draws) -> Draft:
  """One scene with a question and its answer."""
  kinds = (_count, _attribute, _existence, _comparison, _relation)
  kind = kinds[draws.below(5)]
  truth = draws.chance(0.5)
  # Kind and truth are drawn before, so that scenes without room for their
  # objects do not shift their shares.
  while True:
    found = kind(draws, truth)
    if found is not None:
      return found


def _finish(
  draws: Draws,
  objects: list[SceneObject],
  kind: str,
  question: str | None,
  answer: str,
) -> Draft | None:
  if question is None:
    return None
  objects = draws.shuffled(objects)
  if not place(draws, objects):
    return None
  return draft(draws, objects, kind, question, answer)


def with_count(
  draws: Draws, attribute: str, number: int, total: int
) -> tuple[list[SceneObject], str]:
  """A scene with a given number of objects of one colour or shape.

  Returns:
    The objects, `total` of them, and the colour or shape that was counted.
  """
  focus = draws.focus()
  value = getattr(focus, attribute)
  objects = [focus]
  if number == 0:
    options = words.SHAPES if attribute == "shape" else words.COLORS
    value = draws.pick([option for option in options if option != value])
  for _ in range(number - 1):
    objects.append(draws.object(draws.combination(**{attribute: value})))
  while len(objects) < total:
    other = draws.combination(**{f"not_{attribute}": value})
    objects.append(draws.object(other))
  return objects, value


def _count(draws: Draws, truth: bool) -> Draft | None:
  del truth
  limit = draws.level.max_objects
  choice = draws.below(5)
  if choice == 0:
    focus = draws.focus()
    number = draws.number_of_objects()
    objects = [focus, *draws.companions(focus, number - 1)]
    question = "how many objects are there?"
  else:
    attribute = "shape" if choice <= 2 else "color"
    number = draws.below(limit + 1)
    total = max(1, number) + draws.below(limit - max(1, number) + 1)
    objects, value = with_count(draws, attribute, number, total)
    noun = words.PLURALS[value] if choice <= 2 else value + " objects"
    question = f"how many {noun} are there?"
  return _finish(draws, objects, "count", question, str(number))


def _attribute(draws: Draws, truth: bool) -> Draft | None:
  del truth
  focus = draws.focus()
  objects = [focus, *draws.companions(focus, draws.number_of_objects() - 1)]
  asked = draws.pick(
    ("color", "shape", "size", "texture")[: 4 if draws.level.overlap else 3]
  )
  if asked == "color":
    candidates = (("shape",), ("size", "shape"))
  elif asked == "shape":
    candidates = (("color",), ("size", "color"))
  else:
    candidates = (("shape",), ("color",))
    if draws.chance(0.5):
      candidates = (("color",), ("shape",))
    candidates = (*candidates, ("color", "shape"))
  name = describe(focus, objects, candidates)
  question = name and f"what {asked} is the {name}?"
  return _finish(draws, objects, "attribute", question, getattr(focus, asked))


def absent_combination(
  draws: Draws, focus: SceneObject, objects: list[SceneObject]
) -> tuple[str, str] | None:
  """A colour and shape that no object has, though each is there if possible.

  In a held-out scene it is another held-out combination.
  """
  present = {(item.color, item.shape) for item in objects}
  if draws.level.held_out:
    options = [pair for pair in words.HELD_OUT if pair not in present]
    return draws.pick(options)
  others = [item for item in objects if item is not focus]
  for other in draws.shuffled(others):
    for pair in draws.shuffled(
      (
        (focus.color, other.shape),
        (other.color, focus.shape),
      )
    ):
      if pair not in present and pair in words.SEEN:
        return pair
  if draws.chance(0.5):
    pair = draws.combination(color=focus.color, not_shape=focus.shape)
  else:
    pair = draws.combination(shape=focus.shape, not_color=focus.color)
  return None if pair in present else pair


def _existence(draws: Draws, truth: bool) -> Draft | None:
  total = draws.number_of_objects()
  if draws.chance(0.2):
    attribute = "shape" if draws.chance(0.5) else "color"
    number = 1 + draws.below(total) if truth else 0
    objects, value = with_count(draws, attribute, number, total)
    noun = value if attribute == "shape" else value + " object"
    question = f"is there a {noun}?"
  else:
    focus = draws.focus()
    objects = [focus, *draws.companions(focus, total - 1)]
    pair = (focus.color, focus.shape)
    if not truth:
      pair = absent_combination(draws, focus, objects)
    question = pair and f"is there a {pair[0]} {pair[1]}?"
  return _finish(draws, objects, "existence", question, _YES_NO[truth])


def _comparison(draws: Draws, truth: bool) -> Draft | None:
  if draws.chance(0.5):
    return _more(draws, truth)
  focus = draws.focus()
  large = draws.chance(0.5)
  sizes = ("large", "small") if large else ("small", "large")
  first = draws.object((focus.color, focus.shape), sizes[0])
  pair = draws.combination(not_shape=focus.shape)
  second = draws.object(pair, sizes[1])
  objects = [first, second]
  for _ in range(draws.below(draws.level.max_objects - 1)):
    objects.append(draws.object(draws.combination()))
  names = describe(first, objects), describe(second, objects)
  if None in names:
    return None
  word = "larger" if large == truth else "smaller"
  question = f"is the {names[0]} {word} than the {names[1]}?"
  return _finish(draws, objects, "comparison", question, _YES_NO[truth])


def _more(draws: Draws, truth: bool) -> Draft | None:
  """ "are there more circles than squares?"; a tie is a "no"."""
  limit = draws.level.max_objects
  focus = draws.focus()
  attribute = "shape" if draws.chance(0.5) else "color"
  value = getattr(focus, attribute)
  options = words.SHAPES if attribute == "shape" else words.COLORS
  other = draws.pick([option for option in options if option != value])
  while True:
    counts = 1 + draws.below(limit), draws.below(limit)
    if sum(counts) <= limit and (counts[0] != counts[1] or not truth):
      break
  rest = draws.below(limit - sum(counts) + 1)
  objects = [focus]
  for _ in range(counts[0] - 1):
    objects.append(draws.object(draws.combination(**{attribute: value})))
  for _ in range(counts[1]):
    objects.append(draws.object(draws.combination(**{attribute: other})))
  for _ in range(rest):
    pair = draws.combination(**{f"not_{attribute}": value})
    if pair[attribute == "shape"] == other:
      return None
    objects.append(draws.object(pair))
  # The question names the values in the order that makes it true or false.
  if (counts[0] > counts[1]) != truth:
    value, other = other, value
  if attribute == "shape":
    nouns = words.PLURALS[value], words.PLURALS[other]
  else:
    nouns = value + " objects", other + " objects"
  question = f"are there more {nouns[0]} than {nouns[1]}?"
  return _finish(draws, objects, "comparison", question, _YES_NO[truth])


def _relation(draws: Draws, truth: bool) -> Draft | None:
  level = draws.level
  side = draws.pick(level.sides)
  focus = draws.focus()
  total = 2 + draws.below(level.max_objects - 1)
  objects = [focus, *draws.companions(focus, total - 1)]
  other = objects[1]
  candidates = phrases.SHORTEST_FIRST
  if draws.chance(0.5):
    candidates = (("color", "shape"), *candidates[3:])
  names = describe(focus, objects, candidates), describe(other, objects)
  objects = draws.shuffled(objects)
  if None in names or not place(draws, objects):
    return None
  if draws.chance(0.5):
    if draws.chance(0.5):
      focus, other, names = other, focus, names[::-1]
    # The question that is true or false of this picture.
    for side in draws.shuffled(level.sides):
      if (
        phrases.is_on(side, focus, other) == truth
        and phrases.distance(side, focus, other) >= level.gap
      ):
        question = f"is the {names[0]} {side} the {names[1]}?"
        return draft(draws, objects, "relation", question, _YES_NO[truth])
    return None
  on_side = [
    item
    for item in objects
    if item is not other and phrases.is_on(side, item, other)
  ]
  if on_side != [focus] or any(
    phrases.distance(side, item, other) < level.gap
    for item in objects
    if item is not other
  ):
    return None
  if level.overlap:
    question = f"what is {side} the {names[1]}?"
    answer = f"{focus.color} {focus.shape}"
  else:
    question = f"what shape is {side} the {names[1]}?"
    answer = focus.shape
  return draft(draws, objects, "relation", question, answer)
