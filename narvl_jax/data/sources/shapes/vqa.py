"""Questions whose words alone do not reveal the answer.

| kind       | such as                                    | answers         |
| ---------- | ------------------------------------------ | --------------- |
| count      | how many red objects are there?            | 0..3, full 0..5 |
| attribute  | what color is the star?                    | attribute words |
| existence  | is there a red circle?                     | yes, no         |
| comparison | are there more circles than squares?       | yes, no         |
|            | is the circle larger than the star?        | yes, no         |
| relation   | is the red circle left of the star?        | yes, no         |
|            | what shape is left of the star? (easy)     | shapes          |
|            | what is above the star? (full)             | "red circle"    |

Kinds are equally frequent, as are the answers of each form of question. A
"no" about existence is a near miss: where possible the colour and the shape
are both there, on different objects.

A reader of the questions alone is right this often: it knows the most frequent
answer to each of 50,000 questions (train, seed 0) and answers the next 20,000.

| difficulty | all  | count | attribute | existence | comparison | relation |
| ---------- | ---- | ----- | --------- | --------- | ---------- | -------- |
| easy       | 40 % | 29 %  | 30 %      | 52 %      | 50 %       | 40 %     |
| full       | 36 % | 17 %  | 32 %      | 52 %      | 52 %       | 28 %     |
"""

from collections.abc import Callable

from narvl_jax.data.sources.shapes import phrases, words
from narvl_jax.data.sources.shapes.layout import finish, place
from narvl_jax.data.sources.shapes.phrases import describe
from narvl_jax.data.sources.shapes.scene import Draft, Draws, SceneObject, draft

KINDS = ("count", "attribute", "existence", "comparison", "relation")

_YES_NO = {True: "yes", False: "no"}


def compose(draws: Draws) -> Draft:
  """Draws a scene with a question and its answer."""
  kind = draws.pick(KINDS)
  form = draws.pick(_FORMS[kind])
  truth = draws.chance(0.5)
  # Form and truth are drawn first, so that retries after scenes without room
  # do not change their shares.
  while True:
    found = form(draws, truth)
    if found is not None:
      return found


def with_count(
  draws: Draws, attribute: str, number: int, total: int
) -> tuple[list[SceneObject], str]:
  """Returns `total` objects, and the value that `number` of them share.

  Args:
    attribute: "color" or "shape".
  """
  focus = draws.focus()
  value = getattr(focus, attribute)
  if number == 0:
    value = draws.pick([v for v in _values(attribute) if v != value])
  objects = [focus]
  for _ in range(number - 1):
    objects.append(draws.alike(attribute, value))
  while len(objects) < total:
    objects.append(draws.unlike(attribute, value))
  return objects, value


def _values(attribute: str) -> tuple[str, ...]:
  return words.SHAPES if attribute == "shape" else words.COLORS


def several(attribute: str, value: str) -> str:
  """Returns the plural: "circles", "red objects"."""
  return words.PLURALS[value] if attribute == "shape" else value + " objects"


def _count_all(draws: Draws, truth: bool) -> Draft | None:
  del truth
  focus = draws.focus()
  number = draws.number_of_objects()
  objects = [focus, *draws.companions(focus, number - 1)]
  return finish(
    draws, objects, "count", "how many objects are there?", str(number)
  )


def _count_some(draws: Draws, truth: bool) -> Draft | None:
  del truth
  limit = draws.level.max_objects
  attribute = draws.pick(("shape", "color"))
  number = draws.below(limit + 1)
  total = max(1, number) + draws.below(limit - max(1, number) + 1)
  objects, value = with_count(draws, attribute, number, total)
  question = f"how many {several(attribute, value)} are there?"
  return finish(draws, objects, "count", question, str(number))


def _attribute(draws: Draws, truth: bool) -> Draft | None:
  del truth
  focus = draws.focus()
  objects = [focus, *draws.companions(focus, draws.number_of_objects() - 1)]
  options = ("color", "shape", "size", "texture")
  asked = draws.pick(options if len(draws.level.textures) > 1 else options[:3])
  if asked == "color":
    candidates = (("shape",), ("size", "shape"))
  elif asked == "shape":
    candidates = (("color",), ("size", "color"))
  elif draws.chance(0.5):
    candidates = (("shape",), ("color",), ("color", "shape"))
  else:
    candidates = (("color",), ("shape",), ("color", "shape"))
  name = describe(focus, objects, candidates)
  question = name and f"what {asked} is the {name}?"
  return finish(draws, objects, "attribute", question, getattr(focus, asked))


def absent_combination(
  draws: Draws, focus: SceneObject, objects: list[SceneObject]
) -> tuple[str, str] | None:
  """Returns a color and shape that no object has, each present if possible.

  In a held-out scene it is another held-out combination; up to two objects
  (without a place yet) are changed to its color or its shape.
  """
  others = [item for item in objects if item is not focus]
  if draws.level.held_out:
    pair = draws.pick(
      [p for p in words.HELD_OUT if p != (focus.color, focus.shape)]
    )
    wanted = draws.shuffled(({"color": pair[0]}, {"shape": pair[1]}))
    for other, condition in zip(others, wanted, strict=False):
      other.color, other.shape = draws.combination(words.SEEN, **condition)
    return pair
  present = {(item.color, item.shape) for item in objects}
  for other in draws.shuffled(others):
    for pair in draws.shuffled(
      ((focus.color, other.shape), (other.color, focus.shape))
    ):
      if pair not in present and pair in words.SEEN:
        return pair
  if draws.chance(0.5):
    pair = draws.combination(color=focus.color, not_shape=focus.shape)
  else:
    pair = draws.combination(shape=focus.shape, not_color=focus.color)
  return None if pair in present else pair


def _existence_of_one(draws: Draws, truth: bool) -> Draft | None:
  """Such as "is there a circle?" or "is there a red object?"."""
  total = draws.number_of_objects()
  attribute = draws.pick(("shape", "color"))
  number = 1 + draws.below(total) if truth else 0
  objects, value = with_count(draws, attribute, number, total)
  noun = value if attribute == "shape" else value + " object"
  question = f"is there a {noun}?"
  return finish(draws, objects, "existence", question, _YES_NO[truth])


def _existence_of_both(draws: Draws, truth: bool) -> Draft | None:
  """Such as "is there a red circle?"."""
  focus = draws.focus()
  objects = [focus, *draws.others(focus, draws.number_of_objects() - 1)]
  pair = (focus.color, focus.shape)
  if not truth:
    pair = absent_combination(draws, focus, objects)
  question = pair and f"is there a {pair[0]} {pair[1]}?"
  return finish(draws, objects, "existence", question, _YES_NO[truth])


def _larger(draws: Draws, truth: bool) -> Draft | None:
  """Such as "is the circle larger than the star?"."""
  focus = draws.focus()
  small = focus.size == "small"
  other = draws.object(
    draws.combination(not_shape=focus.shape), "large" if small else "small"
  )
  objects = [focus, other]
  for _ in range(draws.below(draws.level.max_objects - 1)):
    objects.append(draws.object(draws.combination()))
  names = describe(focus, objects), describe(other, objects)
  if None in names:
    return None
  word = "smaller" if small == truth else "larger"
  if draws.chance(0.5):
    names, word = names[::-1], "larger" if word == "smaller" else "smaller"
  question = f"is the {names[0]} {word} than the {names[1]}?"
  return finish(draws, objects, "comparison", question, _YES_NO[truth])


def _more(draws: Draws, truth: bool) -> Draft | None:
  """Such as "are there more circles than squares?"; "no" for a tie."""
  limit = draws.level.max_objects
  attribute = draws.pick(("shape", "color"))
  while True:
    counts = 1 + draws.below(limit), draws.below(limit)
    if sum(counts) <= limit and (counts[0] != counts[1] or not truth):
      break
  focus = draws.focus()
  value = getattr(focus, attribute)
  other = draws.pick([v for v in _values(attribute) if v != value])
  objects = [focus]
  for _ in range(counts[0] - 1):
    objects.append(draws.alike(attribute, value))
  for _ in range(counts[1]):
    objects.append(draws.alike(attribute, other))
  for _ in range(draws.below(limit - sum(counts) + 1)):
    item = draws.unlike(attribute, value)
    if getattr(item, attribute) == other:
      return None
    objects.append(item)
  # The order of the values decides the answer.
  first, second = several(attribute, value), several(attribute, other)
  if (counts[0] > counts[1]) != truth:
    first, second = second, first
  question = f"are there more {first} than {second}?"
  return finish(draws, objects, "comparison", question, _YES_NO[truth])


def _related(
  draws: Draws,
) -> tuple[list[SceneObject], list[SceneObject], list[str]] | None:
  """Returns a placed scene and two of its objects with their names."""
  focus = draws.focus()
  total = 2 + draws.below(draws.level.max_objects - 1)
  objects = [focus, *draws.companions(focus, total - 1)]
  pair = [focus, objects[1]]
  candidates = phrases.SHORTEST_FIRST
  if draws.chance(0.5):
    candidates = phrases.SHORTEST_FIRST[2:]
  names = [name for o in pair if (name := describe(o, objects, candidates))]
  objects = draws.shuffled(objects)
  if len(names) < 2 or not place(draws, objects):
    return None
  return objects, pair, names


def _is_on_side(draws: Draws, truth: bool) -> Draft | None:
  """Such as "is the red circle left of the star?"."""
  found = _related(draws)
  if found is None:
    return None
  objects, pair, names = found
  if draws.chance(0.5):
    pair, names = pair[::-1], names[::-1]
  for side in draws.shuffled(draws.level.sides):
    if (
      phrases.is_on(side, *pair) == truth
      and phrases.distance(side, *pair) >= draws.level.gap
    ):
      question = f"is the {names[0]} {side} the {names[1]}?"
      return draft(draws, objects, "relation", question, _YES_NO[truth])
  return None


def _what_is_on_side(draws: Draws, truth: bool) -> Draft | None:
  """Such as "what shape is left of the star?", where one object is."""
  del truth
  found = _related(draws)
  if found is None:
    return None
  objects, (focus, anchor), names = found
  side = draws.pick(draws.level.sides)
  others = [item for item in objects if item is not anchor]
  if [item for item in others if phrases.is_on(side, item, anchor)] != [focus]:
    return None
  if any(phrases.distance(side, o, anchor) < draws.level.gap for o in others):
    return None
  if draws.level.overlap:
    question = f"what is {side} the {names[1]}?"
    answer = f"{focus.color} {focus.shape}"
  else:
    question = f"what shape is {side} the {names[1]}?"
    answer = focus.shape
  return draft(draws, objects, "relation", question, answer)


_FORMS: dict[str, tuple[Callable[[Draws, bool], Draft | None], ...]] = {
  "count": (_count_all, *[_count_some] * 4),
  "attribute": (_attribute,),
  "existence": (_existence_of_one, *[_existence_of_both] * 4),
  "comparison": (_larger, _more),
  "relation": (_is_on_side, _what_is_on_side),
}
